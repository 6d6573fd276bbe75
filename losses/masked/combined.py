"""Losses whose options no single pass computes: a weighted sum over prefixes with any option, and separate terms.

- `matryoshka` with an option that changes the loss: one loss for each prefix, of rows divided by their norms. It takes
  the products of each prefix, which together are more than those of the whole embeddings.
- `TeacherScores` with another option: the loss without it, and the term of the lists.
- `statistics` of a loss with `Teacher`, `same_side` or, without another option, `matryoshka`: a further forward of the
  loss without these, for `matryoshka` of the longest prefix.

Memory stays linear in the batch, and each part has the code, and the exactness, of a loss of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from losses.checks import all_finite
from losses.distributed.api import DistributedBatch, loss_over_ranks
from losses.distributed.local import loss_of_one_process
from losses.inputs import ContrastiveBatch
from losses.negatives.inputs import FurtherNegatives
from losses.negatives.streaming import FrozenPassages
from losses.option_checks.combinations import MASKED, OUTSIDE
from losses.option_checks.objective import Objective, normalized
from losses.options import Matryoshka, Negatives, Ragged, Statistics, TeacherScores
from losses.precision import Precision, resolve_precision
from losses.reference import teacher_scores_term

# Above this size of a workspace, forward keeps exponentials until backward.
KEPT_FROM_MIB = 256

Loss = Callable[..., Any]


def is_combined(given: set[str]) -> bool:
    """Whether the options with these names need several losses or terms."""
    others = set(MASKED) | set(OUTSIDE)
    return bool(
        ("matryoshka" in given and given - {"matryoshka"})
        or ("teacher.scores" in given and given & others)
        or ("statistics" in given and given & {"teacher", "negatives.same_side"})
    )


@torch.compiler.disable
def combined_loss(
    loss_of: Loss,
    query: Tensor,
    passage: Tensor,
    options: dict[str, Any],
    further: FurtherNegatives | None,
    lists: Callable[[], Tensor],
) -> Tensor | tuple[Tensor, Statistics]:
    """The loss, and statistics if wanted, of options for which `is_combined` is true.

    Args:
        loss_of: `inf_cl_loss`.
        query: [M, D].
        passage: [N, D].
        options: Keyword arguments of `loss_of`, checked.
        further: The checked negatives outside the pool.
        lists: Computes the weighted term of the lists of a `TeacherScores`, 0-dim.
    """
    matryoshka, teacher = options["matryoshka"], options["teacher"]
    plain = options["positives"] is None and options["negatives"] is None and teacher is None
    if matryoshka is not None and not plain:
        return _sum_over_prefixes(loss_of, query, passage, options, None if further is None else further.frozen)
    if isinstance(teacher, TeacherScores):
        found = loss_of(query, passage, **(options | {"teacher": None}))
        loss, *statistics = found if options["statistics"] else (found,)
        total: Tensor = loss + lists()
        return (total, *statistics) if statistics else total
    loss = loss_of(query, passage, **(options | {"statistics": False}))
    # What has no part in the rows of S is left out. Of prefixes, the last one counts.
    with torch.no_grad():
        sides = [query.detach(), passage.detach()]
        if matryoshka is not None:
            wide = torch.promote_types(query.dtype, torch.float32)
            sides = [normalized(side[:, : matryoshka.dims[-1]].to(wide)) for side in sides]
        changed: dict[str, Any] = {"matryoshka": None, "teacher": None, "negatives": None, "symmetric": False}
        changed["precision"] = resolve_precision(options["precision"], query)
        _, statistics = loss_of(*sides, **(options | changed))
    return loss, statistics


def lists_of_one_process(
    batch: ContrastiveBatch, objective: Objective, precision: Precision, implementation: str, workspace_bytes: int
) -> Tensor:
    """0-dim: the weighted term of the lists of a `TeacherScores` alone, differentiable once ("full": twice)."""
    teacher = objective.teacher
    assert isinstance(teacher, TeacherScores)
    if implementation == "full":
        term: Tensor = teacher.weight * teacher_scores_term(batch, teacher, precision)
        return torch.where(all_finite(batch.query, batch.passage), term, torch.nan)
    alone = replace(objective, lists_alone=True)
    return loss_of_one_process(_without_masks(batch), alone, precision, workspace_bytes, False)


def lists_over_ranks(sharded: DistributedBatch) -> Tensor:
    """The same term over ranks, differentiable once. Every rank must call it."""
    alone = replace(sharded.objective, lists_alone=True)
    return loss_over_ranks(replace(sharded, batch=_without_masks(sharded.batch), objective=alone))


def _without_masks(batch: ContrastiveBatch) -> ContrastiveBatch:
    return replace(batch, excluded=None, query_ids=None, passage_ids=None, options=None, symmetric=False)


def _sum_over_prefixes(
    loss_of: Loss, query: Tensor, passage: Tensor, options: dict[str, Any], frozen: FrozenPassages | None
) -> Tensor | tuple[Tensor, Statistics]:
    matryoshka: Matryoshka = options["matryoshka"]
    dims = matryoshka.dims
    weights = [1.0] * len(dims) if matryoshka.weights is None else matryoshka.weights
    negatives, statistics = options["negatives"], None
    own = negatives.own if isinstance(negatives, Negatives) else None
    sides = [_invalid_if_not_finite(side, dims[-1]) for side in (query, passage)]
    if own is not None:
        sides.append(_invalid_if_not_finite(own.values, dims[-1]))
    # Prefixes stay in float32: the operands of the products and the sums of their gradients are rounded once.
    sides = [side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides]
    precision = resolve_precision(options["precision"], query)
    share = max(KEPT_FROM_MIB, options["workspace_mib"] / len(dims))
    parts = []
    for size, weight in zip(dims, weights, strict=True):
        prefixes = [normalized(side[:, :size]) for side in sides]
        wanted = options["statistics"] and size == dims[-1]
        changed = {"matryoshka": None, "statistics": wanted, "precision": precision}
        changed["workspace_mib"] = min(share, options["workspace_mib"])
        if isinstance(negatives, Negatives):
            changed["negatives"] = replace(
                negatives,
                own=None if own is None else Ragged(prefixes[2], own.offsets),
                frozen=None if frozen is None else frozen.prefix(size),
            )
        found = loss_of(prefixes[0], prefixes[1], **(options | changed))
        if wanted:
            found, statistics = found
        parts.append(weight * found)
    total = torch.stack(parts).sum()
    return total if statistics is None else (total, statistics)


def _invalid_if_not_finite(side: Tensor, columns: int) -> Tensor:
    """The embeddings; all NaN if a value beyond the first `columns`, which no prefix reads, is not finite."""
    if columns == side.shape[1] or not len(side):
        return side
    return torch.where(all_finite(side), side, torch.nan)
