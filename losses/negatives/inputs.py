"""Checks of `negatives.own`, `negatives.frozen`, `negatives.frozen_excluded` and `negatives.same_side`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from losses.checks import FLOAT_DTYPES, INTEGER_DTYPES, can_check_values, check_bool
from losses.inputs import ContrastiveBatch
from losses.negatives.streaming import FrozenPassages
from losses.options import Negatives, Ragged


@dataclass(frozen=True)
class FurtherNegatives:
    """Checked negatives that add terms to the row sums.

    Attributes:
        own: Own hard negatives of each query, with int64 offsets, or None.
        frozen: Passages without gradient, or None.
        frozen_excluded: [R, 2] int64 pairs (query row, frozen row) with R ≥ 1, or None.
        same_side: Whether the loss has a single partition function with terms within a side.
    """

    own: Ragged | None
    frozen: FrozenPassages | None
    frozen_excluded: Tensor | None
    same_side: bool

    def names(self) -> str:
        """The given fields, for messages."""
        given = {"own": self.own, "frozen": self.frozen, "same_side": self.same_side or None}
        return " and ".join(f"negatives.{name}" for name, value in given.items() if value is not None)

    def sources(self) -> int:
        """Number of sources that give the queries a gradient."""
        return (self.own is not None) + (self.frozen is not None) + self.same_side

    def summary(self) -> tuple[Any, ...]:
        """What must be the same on all ranks."""
        return self.own is not None, None if self.frozen is None else self.frozen.rows, self.same_side


def checked_further(negatives: Negatives | None, query: Tensor) -> FurtherNegatives | None:
    """Check the negatives that are outside the pool; None if there are none.

    Values are checked for CPU tensors only, as in losses/inputs.py.

    Raises:
        ValueError: If a field is invalid. The message begins with its name.
    """
    if negatives is None:
        return None
    check_bool("negatives.same_side", negatives.same_side)
    own = None if negatives.own is None else _checked_own(negatives.own, query)
    frozen = None if negatives.frozen is None else _checked_frozen(negatives.frozen, query)
    pairs = None
    if negatives.frozen_excluded is not None:
        if frozen is None:
            raise ValueError("negatives.frozen_excluded needs negatives.frozen, whose rows it names")
        pairs = _checked_pairs(negatives.frozen_excluded, query, frozen)
    if own is None and frozen is None and not negatives.same_side:
        return None
    return FurtherNegatives(own, frozen, pairs, negatives.same_side)


def with_nan_for_invalid_negatives(
    batch: ContrastiveBatch, further: FurtherNegatives
) -> tuple[ContrastiveBatch, FurtherNegatives]:
    """Set logit_scale, and thereby the loss, to NaN if a value on a GPU, which the host does not check, is invalid.

    Pairs outside the frozen scores are moved inside.
    """
    wrong = []
    if further.own is not None and not can_check_values(further.own.offsets):
        offsets = further.own.offsets
        wrong += [offsets[0] != 0, offsets[-1] != len(further.own.values), (offsets.diff() < 0).any()]
    pairs = further.frozen_excluded
    if pairs is not None and further.frozen is not None and not can_check_values(pairs):
        wrong.append(_outside(pairs, batch.query, further.frozen).any())
        rows, columns = pairs.unbind(1)
        last_row, last_column = max(0, len(batch.query) - 1), max(0, further.frozen.rows - 1)
        pairs = torch.stack([rows.clamp(0, last_row), columns.clamp(0, last_column)], 1)
        further = replace(further, frozen_excluded=pairs)
    if not wrong:
        return batch, further
    scale = torch.where(torch.stack(wrong).any(), torch.nan, batch.logit_scale)
    return replace(batch, logit_scale=scale), further


def _checked_own(own: Ragged, query: Tensor) -> Ragged:
    if not isinstance(own, Ragged):
        raise ValueError(f"negatives.own must be losses.Ragged, found {type(own).__name__}")
    values, offsets = own.values, own.offsets
    if not isinstance(values, Tensor) or values.dim() != 2:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"negatives.own.values must be a matrix [rows, dimensions], found {shape}")
    if values.shape[1] != query.shape[1]:
        raise ValueError(f"negatives.own.values has {values.shape[1]} dimensions, query has {query.shape[1]}")
    if values.dtype != query.dtype:
        raise ValueError(f"negatives.own.values is {values.dtype}, query is {query.dtype}")
    if values.device != query.device:
        raise ValueError(f"negatives.own.values is on {values.device}, query is on {query.device}")
    if not isinstance(offsets, Tensor) or offsets.dtype not in INTEGER_DTYPES:
        found = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise ValueError(f"negatives.own.offsets must be a tensor of int64, found {found}")
    if offsets.shape != (len(query) + 1,):
        raise ValueError(f"negatives.own.offsets must have shape [{len(query) + 1}], found {list(offsets.shape)}")
    if offsets.device != query.device:
        raise ValueError(f"negatives.own.offsets is on {offsets.device}, query is on {query.device}")
    offsets = offsets.to(torch.int64).contiguous()
    if can_check_values(offsets):
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != len(values):
            raise ValueError(
                f"negatives.own.offsets must begin with 0 and end with {len(values)}, found {first}, {last}"
            )
        if (offsets.diff() < 0).any():
            position = int((offsets.diff() < 0).nonzero()[0]) + 1
            raise ValueError(f"negatives.own.offsets must not decrease, found {int(offsets[position])} at {position}")
    return Ragged(values, offsets)


def _checked_frozen(frozen: Any, query: Tensor) -> FrozenPassages:
    if isinstance(frozen, FrozenPassages):
        # The prefix of passages that have been checked.
        source = frozen
    elif isinstance(frozen, Tensor):
        if frozen.dim() != 2:
            raise ValueError(f"negatives.frozen must be a matrix [rows, dimensions], found shape {list(frozen.shape)}")
        if frozen.dtype not in FLOAT_DTYPES:
            raise ValueError(f"negatives.frozen must be float32, bfloat16, float16 or float64, found {frozen.dtype}")
        if frozen.requires_grad:
            raise ValueError("negatives.frozen gets no gradient: give a tensor that requires none (detach it)")
        if frozen.device != query.device and frozen.device.type != "cpu":
            raise ValueError(f"negatives.frozen is on {frozen.device}, query is on {query.device}: use it or the CPU")
        source = FrozenPassages(frozen, *frozen.shape)
    elif all(hasattr(frozen, name) for name in ("rows", "dim", "shards")):
        source = FrozenPassages(frozen, int(frozen.rows), int(frozen.dim))
    else:
        raise ValueError(
            "negatives.frozen must be a tensor [rows, dimensions] or a reader with rows, dim and shards(), "
            f"found {type(frozen).__name__}"
        )
    if source.dim != query.shape[1]:
        raise ValueError(f"negatives.frozen has {source.dim} dimensions, query has {query.shape[1]}")
    return source


def _checked_pairs(pairs: Tensor, query: Tensor, frozen: FrozenPassages) -> Tensor | None:
    name = "negatives.frozen_excluded"
    if not isinstance(pairs, Tensor) or pairs.dtype not in INTEGER_DTYPES:
        found = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
        raise ValueError(f"{name} must be a tensor of int64, found {found}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{name} must have shape [pairs, 2], found {list(pairs.shape)}")
    if pairs.device != query.device:
        raise ValueError(f"{name} is on {pairs.device}, query is on {query.device}")
    pairs = pairs.to(torch.int64).contiguous()
    if can_check_values(pairs) and (outside := _outside(pairs, query, frozen)).any():
        raise ValueError(
            f"{name} must hold rows of {len(query)} queries and {frozen.rows} frozen passages, "
            f"found {pairs[outside][0].tolist()}"
        )
    return pairs if len(pairs) else None


def _outside(pairs: Tensor, query: Tensor, frozen: FrozenPassages) -> Tensor:
    rows, columns = pairs.unbind(1)
    return (rows < 0) | (rows >= len(query)) | (columns < 0) | (columns >= frozen.rows)
