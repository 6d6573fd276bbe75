"""The checked tensors of one contrastive loss: what every implementation computes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# An exbibyte.
MOST_MIB = 2**40


@dataclass(frozen=True)
class ContrastiveBatch:
    """Queries, passages, and which passage is whose positive.

    query [M, D], passage [N, D]: same dtype and device. logit_scale: 0-dim, in `accumulator(query.dtype)`.
    given [M] int64, the positives, or None for 0 … M−1. `diagonal` where they are that, given or not. query_ids [M] and
    passage_ids [N] int64, or both None. excluded [R, 2] int64 (query row, passage row), R ≥ 1, or None.
    """

    query: Tensor
    passage: Tensor
    logit_scale: Tensor
    given: Tensor | None
    query_ids: Tensor | None
    passage_ids: Tensor | None
    symmetric: bool
    diagonal: bool = False
    excluded: Tensor | None = None

    @property
    def positive(self) -> Tensor:
        """[M] int64. Made whenever it is asked for: beside the kernels of a small batch a launch is dear."""
        return torch.arange(len(self.query), device=self.query.device) if self.given is None else self.given


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, sums and gradient accumulators: float64 for float64 embeddings, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def all_finite(*tensors: Tensor) -> Tensor:
    """0-dim bool, without a copy of the tensors and without waiting for their device."""
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
    """Fill in the defaults and raise a ValueError that names the first argument that does not fit.

    A `shard` of a batch over ranks may be empty; its `positive` and the passages of `excluded` are rows of a pool whose
    size is not known here, so that they are not checked and query_ids not taken from them.

    Values (a positive in range, a finite logit_scale) are checked for CPU tensors and Python numbers; looking at the
    values of a CUDA tensor would wait for the device, so there only shape, dtype and device are checked.
    """
    _check_embeddings(query, passage, least=0 if shard else 1)
    check_bool("symmetric", symmetric)
    scale = checked_number("logit_scale", logit_scale, query)
    diagonal = positive is None
    given = checked_positive(positive, query, passage, in_range=not shard)
    excluded = _checked_excluded(excluded, query)
    if excluded is not None and can_look_at(excluded) and not shard:
        check_pairs(excluded, given, len(query), len(passage))
    if passage_ids is None:
        if query_ids is not None:
            raise ValueError("query_ids needs passage_ids: ids of queries are compared with ids of passages")
        return ContrastiveBatch(query, passage, scale, given, None, None, symmetric, diagonal, excluded)
    passage_ids = _checked_indices("passage_ids", passage_ids, passage.shape[0], query.device)
    if query_ids is None:
        query_ids = None if shard else passage_ids[: len(query)] if given is None else _of_positives(passage_ids, given)
    else:
        query_ids = _checked_indices("query_ids", query_ids, query.shape[0], query.device)
    return ContrastiveBatch(query, passage, scale, given, query_ids, passage_ids, symmetric, diagonal, excluded)


def check_bool(name: str, value: bool) -> None:
    """Whether `value` is True or False and nothing that stands for it; a ValueError says what it is."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, found {value!r:.40}")


def check_choice(name: str, value: str, kind: Any) -> None:
    """Whether `value` is one of a Literal's; a ValueError says which there are."""
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, found {value!r}")


def _of_positives(passage_ids: Tensor, positive: Tensor) -> Tensor:
    # On a GPU nobody has looked at them, and one that is no passage would end the process here.
    return passage_ids[positive.clamp(0, len(passage_ids) - 1) if positive.is_cuda else positive]


def can_look_at(tensor: Tensor) -> bool:
    """Whether its values can be checked now: not on a GPU, which would be waited for, nor while a graph is compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def checked_workspace(workspace_mib: float) -> int:
    """In bytes."""
    numeric = isinstance(workspace_mib, int | float) and not isinstance(workspace_mib, bool)
    if not numeric or not 0 < workspace_mib < MOST_MIB:
        raise ValueError(f"workspace_mib must be a positive number of MiB, found {workspace_mib!r:.40}")
    return int(workspace_mib * 2**20)


def _check_embeddings(query: Tensor, passage: Tensor, least: int) -> None:
    for name, tensor in (("query", query), ("passage", passage)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, found {type(tensor).__name__}")
        if tensor.dim() != 2 or len(tensor) < least or tensor.shape[1] == 0:
            size = "non-empty " if least else ""
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
    """A number or 0-dim tensor, finite in the accumulator's dtype, as a tensor of that dtype on the query's device."""
    dtype = accumulator(query.dtype)
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name} must be a number or a 0-dim floating-point tensor, "
                f"found shape {list(value.shape)} of {value.dtype}"
            )
        if value.device != query.device:
            raise ValueError(f"{name} is on {value.device}, query is on {query.device}")
        if can_look_at(value):
            _check_finite(name, value.item(), dtype)
        return value.to(dtype)
    check_number(name, value, dtype, "a number or a 0-dim tensor")
    return torch.full((), value, dtype=dtype, device=query.device)


def check_number(name: str, value: float, dtype: torch.dtype = torch.float32, wanted: str = "a number") -> None:
    """Whether `value` is a number that is finite in a dtype; a ValueError says what it is instead."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be {wanted}, found {type(value).__name__}")
    _check_finite(name, value, dtype)


def _check_finite(name: str, value: float, dtype: torch.dtype) -> None:
    # Written so that NaN fails it.
    if not abs(value) <= torch.finfo(dtype).max:
        raise ValueError(f"{name} must be finite in {str(dtype).removeprefix('torch.')}, found {value!r:.40}")


def checked_positive(positive: Tensor | None, query: Tensor, passage: Tensor, in_range: bool) -> Tensor | None:
    """The positives as int64, or None; a ValueError says what does not fit."""
    queries, passages = query.shape[0], passage.shape[0]
    if positive is None:
        if passages < queries:
            raise ValueError(f"passage has {passages} rows, fewer than the {queries} queries: give positive")
        return None
    positive = _checked_indices("positive", positive, queries, query.device)
    if in_range and can_look_at(positive):
        low, high = (int(extreme) for extreme in positive.aminmax())
        if low < 0 or high >= passages:
            raise ValueError(f"positive must index the {passages} passages, found {low if low < 0 else high}")
    return positive


def _checked_excluded(excluded: Tensor | None, query: Tensor) -> Tensor | None:
    """[R, 2] int64, contiguous; None where there is no pair."""
    if excluded is None:
        return None
    if not isinstance(excluded, Tensor):
        raise ValueError(f"excluded must be an integer tensor, found {type(excluded).__name__}")
    if excluded.dtype not in INTEGER_DTYPES:
        raise ValueError(f"excluded must be a tensor of int64, found {excluded.dtype}")
    if excluded.dim() != 2 or excluded.shape[1] != 2:
        raise ValueError(f"excluded must have shape [pairs, 2], found {list(excluded.shape)}")
    if excluded.device != query.device:
        raise ValueError(f"excluded is on {excluded.device}, query is on {query.device}")
    return excluded.to(torch.int64).contiguous() if len(excluded) else None


def check_pairs(excluded: Tensor, positive: Tensor | None, queries: int, passages: int, first: int = 0) -> None:
    """Refuse pairs [R, 2] of the CPU that lie outside the score matrix or join a query and its own positive.

    Args:
        positive: [M], or None for first … first + M − 1.
    """
    rows, columns = excluded.unbind(1)
    outside = (rows < 0) | (rows >= queries) | (columns < 0) | (columns >= passages)
    if outside.any():
        found = excluded[outside][0].tolist()
        raise ValueError(f"excluded must hold rows of {queries} queries and {passages} passages, found {found}")
    own = columns == (rows + first if positive is None else positive[rows])
    if own.any():
        raise ValueError(f"excluded must not hold a query's own positive, found {excluded[own][0].tolist()}")


def with_checked_pairs(batch: ContrastiveBatch, passages: int) -> ContrastiveBatch:
    """A batch whose values the host does not look at: where a pair of `excluded` does not fit, the logit_scale is NaN,
    and so is the loss. `passages` is the size of the pool that `positive` and `excluded` index."""
    if batch.excluded is None or can_look_at(batch.excluded):
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
