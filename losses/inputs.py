"""The checked batch that every implementation takes, and checks of the arguments that all losses have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from losses.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    can_check_values,
    check_bool,
    checked_indices,
    checked_number,
)
from losses.options import NegativeLimit


@dataclass(frozen=True)
class CheckedOptions:
    """Options that need sums over negatives alone, with the positives as a list of pairs.

    Attributes:
        pairs: [P, 2] int64 further positives (query row, passage row) with P ≥ 1, or None.
        reduction: How the positives of a query are combined; "single" if `positives` is not given. Then queries that
            share a passage are negatives of each other in its column.
        limit: Removes negatives by their score, or None.
        guide_query: [M, G] in the query's dtype, or None.
        guide_passage: [N, G] in the query's dtype, or None.
        guide_margin: In units of the guide's products.
        hardness: β of the weights of negatives.
        statistics: Whether statistics are wanted.
    """

    pairs: Tensor | None = None
    reduction: Literal["single", "mean", "sum"] = "single"
    limit: NegativeLimit | None = None
    guide_query: Tensor | None = None
    guide_passage: Tensor | None = None
    guide_margin: float = 0.0
    hardness: float = 0.0
    statistics: bool = False


@dataclass(frozen=True)
class ContrastiveBatch:
    """Checked tensors of one contrastive loss.

    Attributes:
        query: [M, D] embeddings.
        passage: [N, D] embeddings of the same dtype and on the same device.
        logit_scale: 0-dim, in `accumulator_dtype(query.dtype)`.
        given_positive: [M] int64, the positives, or None for 0, …, M − 1.
        query_ids: [M] int64, or None.
        passage_ids: [N] int64, or None. Both ids are None or neither is, except in a shard whose `query_ids` are not
            known yet.
        symmetric: Whether the loss has a column part.
        diagonal: Whether the positive of query i is passage i.
        excluded: [R, 2] int64 pairs (query row, passage row) with R ≥ 1, or None.
        options: Options that need sums over negatives alone (losses/masked), or None.
        further: [k, M] log-sum-exps of negatives outside the pool, which are added to the row sums
            (losses/negatives), or None. They have a gradient.
        single_partition: Whether each query has one partition function of its row, the column of its positive and
            the further terms. `further` is then not None.
    """

    query: Tensor
    passage: Tensor
    logit_scale: Tensor
    given_positive: Tensor | None
    query_ids: Tensor | None
    passage_ids: Tensor | None
    symmetric: bool
    diagonal: bool = False
    excluded: Tensor | None = None
    options: CheckedOptions | None = None
    further: Tensor | None = None
    single_partition: bool = False

    @property
    def positive(self) -> Tensor:
        """[M] int64, the positives.

        The default is created on each access: kernels with `diagonal` do not need it, and creating it costs a launch.
        """
        return (
            torch.arange(len(self.query), device=self.query.device)
            if self.given_positive is None
            else self.given_positive
        )


def checked_batch(
    query: Tensor,
    passage: Tensor,
    logit_scale: float | Tensor,
    positive: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    symmetric: bool,
    excluded: Tensor | None = None,
    *,
    shard: bool = False,
) -> ContrastiveBatch:
    """Fill in defaults and check the arguments of a loss.

    Values (positives in range, a finite logit_scale) are checked for CPU tensors and Python numbers. For CUDA tensors
    only shape, dtype and device are checked, because reading values would synchronize with the device.

    Args:
        shard: Whether this is one rank's shard of a batch. A shard may be empty. Its `positive` and the passage rows
            of `excluded` refer to the pool, whose size is not known here: they are not checked, and `query_ids` are
            not derived from them.

    Raises:
        ValueError: If an argument is invalid. The message begins with the name of the first such argument.
    """
    _check_embeddings(query, passage, min_rows=0 if shard else 1)
    check_bool("symmetric", symmetric)
    scale = checked_number("logit_scale", logit_scale, query)
    diagonal = positive is None
    given_positive = checked_positive(positive, query, passage, in_range=not shard)
    excluded = checked_pairs("excluded", excluded, query)
    if excluded is not None and can_check_values(excluded) and not shard:
        check_excluded(excluded, given_positive, len(query), len(passage))
    if passage_ids is None:
        if query_ids is not None:
            raise ValueError("query_ids needs passage_ids: ids of queries are compared with ids of passages")
        return ContrastiveBatch(query, passage, scale, given_positive, None, None, symmetric, diagonal, excluded)
    passage_ids = checked_indices("passage_ids", passage_ids, passage.shape[0], query.device)
    if query_ids is None:
        query_ids = (
            None
            if shard
            else passage_ids[: len(query)]
            if given_positive is None
            else _ids_of_positives(passage_ids, given_positive)
        )
    else:
        query_ids = checked_indices("query_ids", query_ids, query.shape[0], query.device)
    return ContrastiveBatch(
        query, passage, scale, given_positive, query_ids, passage_ids, symmetric, diagonal, excluded
    )


def _ids_of_positives(passage_ids: Tensor, positive: Tensor) -> Tensor:
    # Positives on a GPU are not checked. Clamping avoids a device-side assertion; the loss becomes NaN elsewhere.
    return passage_ids[positive.clamp(0, len(passage_ids) - 1) if positive.is_cuda else positive]


def _check_embeddings(query: Tensor, passage: Tensor, min_rows: int) -> None:
    for name, tensor in (("query", query), ("passage", passage)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, found {type(tensor).__name__}")
        if tensor.dim() != 2 or len(tensor) < min_rows or tensor.shape[1] == 0:
            size = "non-empty " if min_rows else ""
            raise ValueError(f"{name} must be a {size}matrix [rows, dimensions], found shape {list(tensor.shape)}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, found {tensor.dtype}")
    if passage.shape[1] != query.shape[1]:
        raise ValueError(f"passage has {passage.shape[1]} dimensions, query has {query.shape[1]}")
    if passage.dtype != query.dtype:
        raise ValueError(f"passage is {passage.dtype}, query is {query.dtype}")
    if passage.device != query.device:
        raise ValueError(f"passage is on {passage.device}, query is on {query.device}")


def checked_positive(positive: Tensor | None, query: Tensor, passage: Tensor, in_range: bool) -> Tensor | None:
    """The positives as int64, or None for 0, …, M − 1.

    Raises:
        ValueError: If `positive` is invalid; with `in_range`, also if a value is not a row of `passage`.
    """
    queries, passages = query.shape[0], passage.shape[0]
    if positive is None:
        if passages < queries:
            raise ValueError(f"passage has {passages} rows, fewer than the {queries} queries: give positive")
        return None
    positive = checked_indices("positive", positive, queries, query.device)
    if in_range and can_check_values(positive):
        low, high = (int(extreme) for extreme in positive.aminmax())
        if low < 0 or high >= passages:
            raise ValueError(f"positive must index the {passages} passages, found {low if low < 0 else high}")
    return positive


def checked_pairs(name: str, pairs: Tensor | None, query: Tensor) -> Tensor | None:
    """[R, 2] int64 contiguous pairs, or None if there are none.

    Raises:
        ValueError: If `pairs` is not a tensor of integers [R, 2] on the query's device.
    """
    if pairs is None:
        return None
    if not isinstance(pairs, Tensor):
        raise ValueError(f"{name} must be an integer tensor, found {type(pairs).__name__}")
    if pairs.dtype not in INTEGER_DTYPES:
        raise ValueError(f"{name} must be a tensor of int64, found {pairs.dtype}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{name} must have shape [pairs, 2], found {list(pairs.shape)}")
    if pairs.device != query.device:
        raise ValueError(f"{name} is on {pairs.device}, query is on {query.device}")
    return pairs.to(torch.int64).contiguous() if len(pairs) else None


def check_pairs_inside(name: str, pairs: Tensor, queries: int, passages: int) -> None:
    """Check that pairs [R, 2] on the CPU are inside the score matrix.

    Raises:
        ValueError: If a pair is not.
    """
    rows, columns = pairs.unbind(1)
    outside = (rows < 0) | (rows >= queries) | (columns < 0) | (columns >= passages)
    if outside.any():
        found = pairs[outside][0].tolist()
        raise ValueError(f"{name} must hold rows of {queries} queries and {passages} passages, found {found}")


def check_excluded(excluded: Tensor, positive: Tensor | None, queries: int, passages: int, first: int = 0) -> None:
    """Check the values of excluded pairs [R, 2] on the CPU.

    Args:
        positive: [M] rows of the positives, or None for first, …, first + M − 1.

    Raises:
        ValueError: If a pair is outside the score matrix, or is a query and its own positive.
    """
    check_pairs_inside("excluded", excluded, queries, passages)
    rows, columns = excluded.unbind(1)
    own = columns == (rows + first if positive is None else positive[rows])
    if own.any():
        raise ValueError(f"excluded must not hold a query's own positive, found {excluded[own][0].tolist()}")


def with_nan_for_invalid_pairs(batch: ContrastiveBatch, passages: int) -> ContrastiveBatch:
    """Set logit_scale, and thereby the loss, to NaN if a pair of `excluded` is invalid.

    For pairs on a GPU, which are not checked on the host. `passages` is the size of the pool that `positive` and
    `excluded` index.
    """
    if batch.excluded is None or can_check_values(batch.excluded):
        return batch
    if not len(batch.query):
        return replace(batch, excluded=None, logit_scale=batch.logit_scale * torch.nan)
    rows, columns = batch.excluded.unbind(1)
    inside = torch.stack([rows.clamp(0, len(batch.query) - 1), columns.clamp(0, passages - 1)], 1)
    wrong = (inside != batch.excluded).any() | (batch.positive[inside[:, 0]] == inside[:, 1]).any()
    return replace(batch, excluded=inside, logit_scale=torch.where(wrong, torch.nan, batch.logit_scale))
