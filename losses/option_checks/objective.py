"""What a loss adds to InfoNCE or changes in it: the options `matryoshka` and `teacher`, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.checks import FLOAT_DTYPES, INTEGER_DTYPES, accumulator_dtype, can_check_values, check_choice, check_number
from losses.inputs import ContrastiveBatch
from losses.options import Matryoshka, Teacher, TeacherKind, TeacherScores

# Prefixes that are shorter count as zero.
SHORTEST_PREFIX = 1e-12


def normalized(prefix: Tensor) -> Tensor:
    """Rows divided by their norm; zero for rows that are shorter than SHORTEST_PREFIX, NaN for those not finite."""
    length = torch.linalg.vector_norm(prefix, dim=1, keepdim=True)
    return torch.where(length < SHORTEST_PREFIX, 0, prefix / length.clamp(min=SHORTEST_PREFIX))


@dataclass(frozen=True)
class Prefixes:
    """Checked `Matryoshka`: sizes of the prefixes, increasing, and the weight of each."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def slices(self) -> list[slice]:
        """The columns that each prefix adds to the previous one."""
        return [slice(start, stop) for start, stop in zip((0, *self.dims), self.dims, strict=False)]

    def weight_column(self, like: Tensor) -> Tensor:
        """[prefixes, 1], the weights in the dtype and on the device of `like`."""
        # A list would be copied from pageable memory, for which the host waits.
        parts = [torch.full((1, 1), weight, dtype=like.dtype, device=like.device) for weight in self.weights]
        return torch.cat(parts)


@dataclass(frozen=True)
class Objective:
    """Checked options. None: the loss does not have the option."""

    prefixes: Prefixes | None = None
    teacher: Teacher | TeacherScores | None = None
    lists_alone: bool = False
    """Whether the loss is the term of `TeacherScores` alone, without InfoNCE."""

    @property
    def plain(self) -> bool:
        """Whether the loss is InfoNCE alone."""
        return self.prefixes is None and self.teacher is None

    def compared(self) -> dict[str, Any]:
        """Values that must be the same on all ranks, by argument name."""
        teacher: Any = None
        if isinstance(self.teacher, Teacher):
            found = self.teacher
            teacher = ("Teacher", found.scale, found.weight, found.query.shape[1], found.query.dtype)
        elif self.teacher is not None:
            teacher = ("TeacherScores", self.teacher.kind, self.teacher.scale, self.teacher.weight)
        return {"matryoshka": self.prefixes, "teacher": teacher}


INFO_NCE = Objective()


def checked_objective(
    batch: ContrastiveBatch, matryoshka: Matryoshka | None, teacher: Teacher | TeacherScores | None, shard: bool = False
) -> Objective:
    """Check `matryoshka` and `teacher` against the other arguments.

    Args:
        shard: Whether `batch` is one rank's shard; rows of the pool are then not checked here.

    Raises:
        ValueError: If an option is invalid. The message begins with the argument's name.
    """
    prefixes = None if matryoshka is None else _checked_prefixes(matryoshka, batch.query.shape[1])
    if isinstance(teacher, Teacher):
        return Objective(prefixes, _checked_teacher(teacher, batch))
    if isinstance(teacher, TeacherScores):
        return Objective(prefixes, _checked_scores(teacher, batch, shard))
    if teacher is not None:
        raise ValueError(f"teacher must be a Teacher or TeacherScores, found {type(teacher).__name__}")
    return Objective(prefixes)


def _checked_prefixes(matryoshka: Matryoshka, width: int) -> Prefixes:
    if not isinstance(matryoshka, Matryoshka):
        raise ValueError(f"matryoshka must be a Matryoshka, found {type(matryoshka).__name__}")
    dims, weights = matryoshka.dims, matryoshka.weights
    known = isinstance(dims, Sequence) and all(isinstance(d, int) and not isinstance(d, bool) for d in dims)
    if not known or not dims:
        raise ValueError(f"matryoshka.dims must be whole numbers, at least one, found {dims!r:.60}")
    if any(one >= other for one, other in zip((0, *dims), dims, strict=False)):
        raise ValueError(f"matryoshka.dims must be positive and increasing, found {dims!r:.60}")
    if dims[-1] > width:
        raise ValueError(f"matryoshka.dims must be at most the embeddings' {width} dimensions, found {dims[-1]}")
    if weights is None:
        weights = [1.0] * len(dims)
    if not isinstance(weights, Sequence) or len(weights) != len(dims):
        raise ValueError(f"matryoshka.weights must be {len(dims)} numbers, one for each size, found {weights!r:.60}")
    for weight in weights:
        check_number("matryoshka.weights", weight)
    return Prefixes(tuple(dims), tuple(float(weight) for weight in weights))


def _checked_teacher(teacher: Teacher, batch: ContrastiveBatch) -> Teacher:
    sides = {"query": (teacher.query, len(batch.query)), "passage": (teacher.passage, len(batch.passage))}
    for name, (side, rows) in sides.items():
        if not isinstance(side, Tensor):
            raise ValueError(f"teacher.{name} must be a tensor, found {type(side).__name__}")
        if side.dim() != 2 or len(side) != rows or side.shape[1] == 0:
            raise ValueError(f"teacher.{name} must have shape [{rows}, dimensions], found {list(side.shape)}")
        if side.dtype not in FLOAT_DTYPES:
            raise ValueError(f"teacher.{name} must be float32, bfloat16, float16 or float64, found {side.dtype}")
        if side.device != batch.query.device:
            raise ValueError(f"teacher.{name} is on {side.device}, query is on {batch.query.device}")
    if teacher.query.shape[1] != teacher.passage.shape[1]:
        found = teacher.query.shape[1], teacher.passage.shape[1]
        raise ValueError(f"teacher.passage has {found[1]} dimensions, teacher.query has {found[0]}")
    check_number("teacher.scale", teacher.scale)
    check_number("teacher.weight", teacher.weight)
    # Products are computed in the precision of the embeddings.
    query, passage = (side.detach().to(batch.query.dtype) for side in (teacher.query, teacher.passage))
    return Teacher(query, passage, float(teacher.scale), float(teacher.weight))


def _checked_scores(teacher: TeacherScores, batch: ContrastiveBatch, shard: bool) -> TeacherScores:
    check_choice("teacher.kind", teacher.kind, TeacherKind)
    passages = _checked_vector("teacher.passages", teacher.passages, None, INTEGER_DTYPES, batch)
    offsets = _checked_vector("teacher.offsets", teacher.offsets, len(batch.query) + 1, INTEGER_DTYPES, batch)
    scores = _checked_vector("teacher.scores", teacher.scores, len(passages), FLOAT_DTYPES, batch)
    check_number("teacher.scale", teacher.scale)
    check_number("teacher.weight", teacher.weight)
    if can_check_values(passages) and not shard and len(passages):
        low, high = (int(extreme) for extreme in passages.aminmax())
        if low < 0 or high >= len(batch.passage):
            found = low if low < 0 else high
            raise ValueError(f"teacher.passages must index the {len(batch.passage)} passages, found {found}")
    if can_check_values(offsets):
        steps = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(passages) or (len(steps) and int(steps.min()) < 0):
            raise ValueError(f"teacher.offsets must rise from 0 to the {len(passages)} passages of the lists")
    wide = accumulator_dtype(batch.query.dtype)
    found_scores = scores.detach().to(wide)
    return TeacherScores(
        passages.long(), offsets.long(), found_scores, teacher.kind, float(teacher.scale), float(teacher.weight)
    )


def _checked_vector(
    name: str, tensor: Tensor, rows: int | None, dtypes: tuple[torch.dtype, ...], batch: ContrastiveBatch
) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, found {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be a tensor of {known}, found {tensor.dtype}")
    if tensor.dim() != 1 or (rows is not None and len(tensor) != rows):
        raise ValueError(f"{name} must have shape [{'rows' if rows is None else rows}], found {list(tensor.shape)}")
    if tensor.device != batch.query.device:
        raise ValueError(f"{name} is on {tensor.device}, query is on {batch.query.device}")
    return tensor
