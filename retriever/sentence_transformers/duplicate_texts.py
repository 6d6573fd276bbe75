"""Find equal texts in a batch of token ids, and the false negatives that follow from them.

For losses that receive tokenized texts only. Texts with equal token ids are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losses.distributed.communication import communication_of
from retriever.data.false_negatives import FalseNegatives, find_false_negatives, rank_slices

_NON_TEXT_KEYS = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
# The finalizer of splitmix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014), in int64.
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_GOLDEN = -0x61C8864680B583EB


@dataclass(frozen=True)
class Masks:
    """Masks of this rank, as the arguments of the same names of `losses.inf_cl_loss`."""

    query_ids: Tensor
    """int64 [M]"""
    passage_ids: Tensor
    """int64 [N]"""
    excluded: Tensor
    """int64 [R, 2]: rows of this rank's queries and rows of the pool."""


def duplicate_masks(columns: list[Tensor], group: Any = None) -> Masks:
    """Mask the passages that the batch pairs with a query's text.

    These are passages equal to the query's own positive, in any column, and passages equal to the positive of an equal
    query. Every rank of `group` must call it.

    Args:
        columns: int64 [M] each, with equal numbers for equal texts: queries, positives, and any number of columns of
            hard negatives. The passages of the loss are the positives and then each column of negatives.
        group: process group whose ranks each hold a part of the batch, with any number of rows and columns. Default:
            None, one process.

    Returns:
        The masks of this rank.
    """
    device = columns[0].device
    shape = len(columns[0]), len(columns)
    if group is None:
        shapes, rank = [shape], 0
        pool = torch.cat(columns)
    else:
        communication = communication_of(group)
        rank = communication.rank
        shapes = [(rows, width) for rows, width in communication.gather_host(torch.tensor(shape)).tolist()]
        pool = communication.gather_rows(torch.cat(columns), [rows * width for rows, width in shapes])
    parts = np.split(pool.cpu().numpy(), np.cumsum([rows * width for rows, width in shapes])[:-1])
    queries, positives, negatives = (
        np.concatenate([part[start * rows : end and end * rows] for part, (rows, _) in zip(parts, shapes, strict=True)])
        for start, end in ((0, 1), (1, 2), (2, None))
    )
    masks = find_false_negatives(queries, positives, negatives)
    return _masks_of_rank(masks, shapes, rank, device)


def _masks_of_rank(masks: FalseNegatives, shapes: list[Any], rank: int, device: torch.device) -> Masks:
    """Select the masks of a rank.

    `masks` numbers passages as all ranks' positives, then all ranks' negatives. In the pool, the negatives of a rank
    follow its positives.
    """
    positive_rows = rank_slices([rows for rows, _ in shapes])
    negative_rows = rank_slices([rows * (width - 2) for rows, width in shapes])
    rank_rows = rank_slices([rows * (width - 1) for rows, width in shapes])
    total_positives = positive_rows[-1].stop
    pool_row = np.empty(len(masks.passage_ids), dtype=np.int64)
    for positives, negatives, in_pool in zip(positive_rows, negative_rows, rank_rows, strict=True):
        first_negative = in_pool.start + positives.stop - positives.start
        pool_row[positives] = np.arange(in_pool.start, first_negative)
        pool_row[total_positives:][negatives] = np.arange(first_negative, in_pool.stop)
    own = positive_rows[rank]
    passage_ids = [masks.passage_ids[own], masks.passage_ids[total_positives:][negative_rows[rank]]]
    query, passage = masks.excluded.T
    is_own = (query >= own.start) & (query < own.stop)
    excluded = np.stack([query[is_own] - own.start, pool_row[passage[is_own]]], axis=1)
    arrays = (masks.query_ids[own], np.concatenate(passage_ids), excluded)
    return Masks(*(torch.from_numpy(array).to(device) for array in arrays))


def text_hashes(features: dict[str, Any]) -> Tensor:
    """Hash the token ids of each text, with the same result on every machine.

    Two different texts have the same hash with probability 2^-64. Padding does not change the hash.

    Args:
        features: features of a column, from the preprocessing of sentence-transformers: `input_ids` [rows, length] with
            `attention_mask`; or all texts end to end, with `cu_seq_lens_q` [rows + 1] (a Transformer that unpads) or
            `offsets` [rows] (StaticEmbedding).

    Returns:
        int64 [rows].

    Raises:
        ValueError: the column does not contain text.
    """
    token = features.get("input_ids")
    non_text = [key for key in _NON_TEXT_KEYS if key in features]
    if not isinstance(token, Tensor) or non_text:
        found = ", ".join(non_text or sorted(features))
        raise ValueError(f"mask_duplicates compares token ids, found a column of {found}: pass mask_duplicates=False")
    if "cu_seq_lens_q" in features or "offsets" in features:
        return _packed_text_hashes(token.flatten(), features)
    mask = features.get("attention_mask")
    attended = torch.ones_like(token) if mask is None else (mask != 0).to(token.dtype)
    position = attended.cumsum(1)
    return _mix((_token_hashes(token, position) * attended).sum(1))


def _packed_text_hashes(token: Tensor, features: dict[str, Any]) -> Tensor:
    starts = (features["cu_seq_lens_q"][:-1] if "cu_seq_lens_q" in features else features["offsets"]).long()
    row = torch.searchsorted(starts, torch.arange(len(token), device=token.device), right=True) - 1
    position = torch.arange(1, len(token) + 1, device=token.device) - starts[row]
    sums = torch.zeros(len(starts), dtype=torch.int64, device=token.device)
    return _mix(sums.index_add(0, row, _token_hashes(token, position)))


def _token_hashes(token: Tensor, position: Tensor) -> Tensor:
    """Hash each token with its position. The hash of a text is that of their sum."""
    return _mix(_mix(token.long()) + position.long() * _GOLDEN)


def _mix(value: Tensor) -> Tensor:
    value = value + _GOLDEN
    # A right shift of signed integers copies the sign bit; the masks remove the copies.
    value = (value ^ ((value >> 30) & (2**34 - 1))) * _MULTIPLIERS[0]
    value = (value ^ ((value >> 27) & (2**37 - 1))) * _MULTIPLIERS[1]
    return value ^ ((value >> 31) & (2**33 - 1))
