"""Equal texts in a batch of token ids: which passages of the batch are false negatives of which queries.

For losses that get tokenized texts without the texts. Equal token ids count as equal texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losses.distributed.communication import communication_of
from retriever.data.false_negatives import FalseNegatives, find_false_negatives, rank_slices

_NOT_TEXT = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
# The finalizer of splitmix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014), in int64.
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_GOLDEN = -0x61C8864680B583EB


@dataclass(frozen=True)
class Masks:
    """Arguments of the same names of `losses.inf_cl_loss`, for this rank's rows."""

    query_ids: Tensor
    """[M]"""
    passage_ids: Tensor
    """[N]"""
    excluded: Tensor
    """[R, 2]: rows of this rank's queries and rows of the pool."""


def duplicate_masks(columns: list[Tensor], group: Any = None) -> Masks:
    """Mask equal texts: a passage that the batch pairs with a query's text is not a negative of that query.

    That is a passage equal to the query's own positive, in whichever column, and a passage equal to the positive of
    an equal query. Every rank of `group` calls it.

    Args:
        columns: [M] int64 each, equal for equal texts: queries, positives, and any number of hard negatives. The
            passages of the loss are the positives and then each column of negatives.
        group: process group whose ranks each hold a part of the batch, with any number of rows and columns; or None.
    """
    device = columns[0].device
    rows, columns_here = len(columns[0]), len(columns)
    if group is None:
        counts, rank = [(rows, columns_here)], 0
        pool = torch.cat(columns)
    else:
        link = communication_of(group)
        rank = link.rank
        counts = [tuple(each) for each in link.gather_host(torch.tensor([rows, columns_here])).tolist()]
        pool = link.gather_rows(torch.cat(columns), [count * width for count, width in counts])
    shares = np.split(pool.cpu().numpy(), np.cumsum([count * width for count, width in counts])[:-1])
    queries, positives, negatives = (
        np.concatenate(
            [share[start * count : end and end * count] for share, (count, _) in zip(shares, counts, strict=True)]
        )
        for start, end in ((0, 1), (1, 2), (2, None))
    )
    found = find_false_negatives(queries, positives, negatives)
    return _share_of_rank(found, counts, rank, device)


def _share_of_rank(found: FalseNegatives, counts: list[Any], rank: int, device: torch.device) -> Masks:
    """From rows of (all ranks' positives, all ranks' negatives) to those of the pool, in which a rank's negatives
    follow its positives."""
    of_positives = rank_slices([rows for rows, _ in counts])
    of_negatives = rank_slices([rows * (width - 2) for rows, width in counts])
    of_rank = rank_slices([rows * (width - 1) for rows, width in counts])
    all_positives = of_positives[-1].stop
    pool_row = np.empty(len(found.passage_ids), dtype=np.int64)
    for positives, negatives, there in zip(of_positives, of_negatives, of_rank, strict=True):
        split = there.start + positives.stop - positives.start
        pool_row[positives] = np.arange(there.start, split)
        pool_row[all_positives:][negatives] = np.arange(split, there.stop)
    own = of_positives[rank]
    passage_ids = [found.passage_ids[own], found.passage_ids[all_positives:][of_negatives[rank]]]
    query, passage = found.excluded.T
    mine = (query >= own.start) & (query < own.stop)
    excluded = np.stack([query[mine] - own.start, pool_row[passage[mine]]], axis=1)
    arrays = (found.query_ids[own], np.concatenate(passage_ids), excluded)
    return Masks(*(torch.from_numpy(array).to(device) for array in arrays))


def text_hashes(features: dict[str, Any]) -> Tensor:
    """[rows] int64: a hash of each text's token ids, the same on every machine.

    Of different texts two share theirs once in 2^64. Padding does not matter, on either side or none.

    Args:
        features: of one column, as sentence-transformers' preprocessing gives them: `input_ids` [rows, length] with
            `attention_mask`; or all texts end to end, with `cu_seq_lens_q` [rows + 1] (a Transformer that unpads) or
            `offsets` [rows] (StaticEmbedding).

    Raises:
        ValueError: the column holds something else than text.
    """
    token = features.get("input_ids")
    other = [key for key in _NOT_TEXT if key in features]
    if not isinstance(token, Tensor) or other:
        found = ", ".join(other or sorted(features))
        raise ValueError(f"mask_duplicates compares token ids, found a column of {found}: pass mask_duplicates=False")
    if "cu_seq_lens_q" in features or "offsets" in features:
        return _of_texts_end_to_end(token.flatten(), features)
    mask = features.get("attention_mask")
    attended = torch.ones_like(token) if mask is None else (mask != 0).to(token.dtype)
    place = attended.cumsum(1)
    return _mixed((_of_tokens(token, place) * attended).sum(1))


def _of_texts_end_to_end(token: Tensor, features: dict[str, Any]) -> Tensor:
    starts = (features["cu_seq_lens_q"][:-1] if "cu_seq_lens_q" in features else features["offsets"]).long()
    row = torch.searchsorted(starts, torch.arange(len(token), device=token.device), right=True) - 1
    place = torch.arange(1, len(token) + 1, device=token.device) - starts[row]
    sums = torch.zeros(len(starts), dtype=torch.int64, device=token.device)
    return _mixed(sums.index_add(0, row, _of_tokens(token, place)))


def _of_tokens(token: Tensor, place: Tensor) -> Tensor:
    """A random number for each token at its place; their sum is the text's."""
    return _mixed(_mixed(token.long()) + place.long() * _GOLDEN)


def _mixed(value: Tensor) -> Tensor:
    value = value + _GOLDEN
    # Shifts of signed integers copy the sign; the masks take the copies away.
    value = (value ^ ((value >> 30) & (2**34 - 1))) * _MULTIPLIERS[0]
    value = (value ^ ((value >> 27) & (2**37 - 1))) * _MULTIPLIERS[1]
    return value ^ ((value >> 31) & (2**33 - 1))
