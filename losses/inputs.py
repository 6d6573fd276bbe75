"""Checks of the loss arguments, and the checked batch that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from losses.checked_options import CheckedOptions

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# 2**40 MiB are an exbibyte.
MAX_WORKSPACE_MIB = 2**40


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


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, sums and gradient accumulators: float64 for float64 embeddings, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def all_finite(*tensors: Tensor) -> Tensor:
    """0-dim bool, whether all values are finite; makes no copy and does not synchronize with the device."""
    extremes = [extreme for tensor in tensors for extreme in tensor.aminmax()]
    return torch.stack(extremes).isfinite().all()


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
    passage_ids = _checked_indices("passage_ids", passage_ids, passage.shape[0], query.device)
    if query_ids is None:
        query_ids = (
            None
            if shard
            else passage_ids[: len(query)]
            if given_positive is None
            else _ids_of_positives(passage_ids, given_positive)
        )
    else:
        query_ids = _checked_indices("query_ids", query_ids, query.shape[0], query.device)
    return ContrastiveBatch(
        query, passage, scale, given_positive, query_ids, passage_ids, symmetric, diagonal, excluded
    )


def check_bool(name: str, value: bool) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, found {value!r:.40}")


def check_choice(name: str, value: str, kind: Any) -> None:
    """Raise a ValueError unless `value` is one of the values of the Literal `kind`."""
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, found {value!r}")


def _ids_of_positives(passage_ids: Tensor, positive: Tensor) -> Tensor:
    # Positives on a GPU are not checked. Clamping avoids a device-side assertion; the loss becomes NaN elsewhere.
    return passage_ids[positive.clamp(0, len(passage_ids) - 1) if positive.is_cuda else positive]


def can_check_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be checked.

    Not on a GPU, to avoid a synchronization, and not under torch.compile.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def checked_workspace(workspace_mib: float) -> int:
    """The workspace in bytes.

    Raises:
        ValueError: If `workspace_mib` is not a positive number.
    """
    numeric = isinstance(workspace_mib, int | float) and not isinstance(workspace_mib, bool)
    if not numeric or not 0 < workspace_mib < MAX_WORKSPACE_MIB:
        raise ValueError(f"workspace_mib must be a positive number of MiB, found {workspace_mib!r:.40}")
    return int(workspace_mib * 2**20)


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


def checked_number(name: str, value: float | Tensor, query: Tensor) -> Tensor:
    """Convert a number or 0-dim tensor to a 0-dim tensor on the query's device, in the accumulator dtype.

    Raises:
        ValueError: If `value` is neither, or is not finite in that dtype.
    """
    dtype = accumulator_dtype(query.dtype)
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name} must be a number or a 0-dim floating-point tensor, "
                f"found shape {list(value.shape)} of {value.dtype}"
            )
        if value.device != query.device:
            raise ValueError(f"{name} is on {value.device}, query is on {query.device}")
        if can_check_values(value):
            _check_finite(name, value.item(), dtype)
        return value.to(dtype)
    check_number(name, value, dtype, "a number or a 0-dim tensor")
    return torch.full((), value, dtype=dtype, device=query.device)


def check_number(name: str, value: float, dtype: torch.dtype = torch.float32, wanted: str = "a number") -> None:
    """Raise a ValueError unless `value` is a number that is finite in `dtype`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be {wanted}, found {type(value).__name__}")
    _check_finite(name, value, dtype)


def _check_finite(name: str, value: float, dtype: torch.dtype) -> None:
    # The comparison is negated so that NaN fails it.
    if not abs(value) <= torch.finfo(dtype).max:
        raise ValueError(f"{name} must be finite in {str(dtype).removeprefix('torch.')}, found {value!r:.40}")


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
    positive = _checked_indices("positive", positive, queries, query.device)
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


def _checked_indices(name: str, tensor: Tensor, rows: int, device: torch.device) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be an integer tensor, found {type(tensor).__name__}")
    if tensor.dtype not in INTEGER_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGER_DTYPES)
        raise ValueError(f"{name} must be a tensor of {known}, found {tensor.dtype}")
    if tensor.shape != (rows,):
        raise ValueError(f"{name} must have shape [{rows}], found {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, query is on {device}")
    return tensor.to(torch.int64)
