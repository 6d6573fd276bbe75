"""Random batches with any options of `inf_cl_loss`, and the loss by its equations from whole float64 matrices."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from losses import (
    Guide,
    Matryoshka,
    NegativeLimit,
    Negatives,
    Positives,
    Ragged,
    Teacher,
    TeacherScores,
    inf_cl_loss,
)
from losses.option_checks.combinations import REFUSED

OPTIONS = (
    "positives", "limit", "guide", "hardness", "statistics", "own", "frozen", "same_side", "matryoshka", "teacher",
    "scores",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """float64 embeddings and the arguments of the loss beside them; `own` are the values of own negatives."""

    query: Tensor
    passage: Tensor
    scale: float
    arguments: Mapping[str, Any]
    own: Tensor | None = None

    @property
    def negatives(self) -> Negatives:
        return self.arguments.get("negatives") or Negatives()

    @property
    def positive(self) -> Tensor:
        given = self.arguments.get("positive")
        return torch.arange(len(self.query)) if given is None else given

    def leaves(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Query, passage, logit_scale and, if there are any, own negatives, which require gradients."""
        scale = torch.tensor(self.scale, dtype=torch.promote_types(dtype, torch.float32))
        sides = (self.query.to(dtype), self.passage.to(dtype), scale)
        sides += () if self.own is None else (self.own.to(dtype),)
        return [side.clone().requires_grad_() for side in sides]


def random_case(seed: int, names: tuple[str, ...] = (), largest: int = 31) -> Case:
    """A case with the named options, or with up to five random ones that combine. Values are exact in float32."""
    random_, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    if not names:
        names = tuple(random_.sample(OPTIONS, random_.choice([1, 2, 2, 3, 4, 5])))
        while not combines(names):
            names = tuple(random_.sample(OPTIONS, random_.choice([1, 2, 2, 3, 4, 5])))
    queries = random_.choice([size for size in (1, 2, 7, 13, 19, 31) if size <= largest])
    dims, further = random_.choice([3, 5, 17, 33]), random_.choice([0, 1, 5])
    given_positive = random_.random() < 0.4
    passages = max(1, queries - 3) if given_positive and random_.random() < 0.4 else queries + further

    def unit(rows: int, width: int = dims) -> Tensor:
        return normalized(torch.randn(rows, width, dtype=torch.float64, generator=generator)).float().double()

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def offsets(most: int) -> Tensor:
        return torch.cat([torch.zeros(1).long(), integers(most + 1, queries).cumsum(0)])

    query, passage = unit(queries), unit(passages)
    positive = integers(passages, queries) if given_positive else torch.arange(queries)
    passage[positive] = normalized(passage[positive] + 0.6 * query).float().double()
    found: dict[str, Any] = {"symmetric": random_.random() < 0.5, "positive": positive if given_positive else None}
    if random_.random() < 0.4:
        found["passage_ids"] = integers(max(1, passages // 2), passages)
        if random_.random() < 0.5:
            found["query_ids"] = integers(max(1, passages // 2), queries)
    known = {(row, int(column)) for row, column in enumerate(positive)}
    if "positives" in names:
        pairs = torch.stack([integers(queries, queries + 2), integers(passages, queries + 2)], 1)
        found["positives"] = Positives(pairs, random_.choice(["mean", "sum"]))  # type: ignore[arg-type]
        known |= {(row, column) for row, column in pairs.tolist()}
    drawn = zip(integers(queries, 2 * queries).tolist(), integers(passages, 2 * queries).tolist(), strict=True)
    if excluded := [pair for pair in drawn if pair not in known]:
        found["excluded"] = torch.tensor(excluded)
    limits = [(0.05, None), (-0.1, None), (None, 0.95), (None, 0.4), (0.3, 1.1)]
    own = None
    of_negatives: dict[str, Any] = {}
    if "limit" in names:
        of_negatives["limit"] = NegativeLimit(*random_.choice(limits))
    if "guide" in names:
        of_negatives["guide"] = Guide(unit(queries, 4), unit(passages, 4), random_.choice([0.0, 0.1, -0.2]))
    if "hardness" in names:
        of_negatives["hardness"] = random_.choice([0.5, 2.0, 10.0])
    if "same_side" in names:
        of_negatives["same_side"] = True
    if "own" in names:
        rows = offsets(4)
        own = unit(int(rows[-1]))
        of_negatives["own"] = Ragged(own, rows)
    if "frozen" in names:
        of_negatives["frozen"] = unit(37)
        of_negatives["frozen_excluded"] = torch.stack([integers(queries, 5), integers(37, 5)], 1)
    if of_negatives:
        found["negatives"] = Negatives(**of_negatives)
    if "matryoshka" in names:
        sizes = sorted(random_.sample(range(2, dims + 1), min(dims - 1, random_.choice([1, 2, 4]))))
        found["matryoshka"] = Matryoshka(sizes, random_.choice([None, [0.5 + size for size in sizes]]))
    if "teacher" in names:
        found["teacher"] = Teacher(unit(queries, 6), unit(passages, 6), random_.choice([1.0, 9.0]), 0.3)
    if "scores" in names:
        rows = offsets(5)
        length = int(rows[-1])
        scores = torch.randn(length, generator=generator)
        kind: Any = random_.choice(["kl", "margin_mse"])
        found["teacher"] = TeacherScores(integers(passages, length), rows, scores, kind, 2.0, 0.3)
    found["statistics"] = "statistics" in names
    return Case(query, passage, random_.choice([1.0, 20.0, 60.0]), found, own)


def combines(names: tuple[str, ...]) -> bool:
    """Whether the loss takes these options together."""
    if "teacher" in names and "scores" in names:
        return False
    negatives = {f"negatives.{name}" for name in names if name in {field.name for field in fields(Negatives)}}
    public = negatives | set(names)
    return not any(one in public and other in public for some, others, _ in REFUSED for one in some for other in others)


def found_by(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", **options: Any) -> Any:
    """Value and gradients in float64, and statistics or None, of `inf_cl_loss` with further options."""
    from option_cases import moved

    leaves = case.leaves(dtype)
    given = dict(case.arguments)
    if len(leaves) == 4:
        given["negatives"] = replace(case.negatives, own=Ragged(leaves[3], case.negatives.own.offsets))  # type: ignore
    if isinstance(frozen := case.negatives.frozen, Tensor):
        given["negatives"] = replace(given["negatives"], frozen=frozen.to(dtype))
    query, passage, scale = (leaf.to(device) for leaf in leaves[:3])
    found = inf_cl_loss(query, passage, logit_scale=scale, **moved(given, device), **options)
    loss, statistics = found if case.arguments["statistics"] else (found, None)
    return with_gradients(loss, leaves), statistics


def defined(case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Value and gradients, and statistics, by the equations."""
    query, passage, scale, *own = case.leaves()
    values, frozen = (own[0] if own else None), case.negatives.frozen
    matryoshka = case.arguments.get("matryoshka")
    if matryoshka is None:
        loss, statistics = _loss(case, query, passage, scale, values, frozen)
    else:
        weights = matryoshka.weights or [1.0] * len(matryoshka.dims)
        loss = torch.zeros((), dtype=torch.float64)
        for size, weight in zip(matryoshka.dims, weights, strict=True):
            sides = (None if side is None else normalized(side[:, :size]) for side in (query, passage, values, frozen))
            q, k, v, f = sides
            assert q is not None and k is not None
            of_prefix, statistics = _loss(case, q, k, scale, v, f)
            loss = loss + weight * of_prefix
    return with_gradients(loss, [query, passage, scale, *own]), statistics


def with_gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients of 0.7 times the value, in float64."""
    gradients = torch.autograd.grad(0.7 * loss, leaves, allow_unused=True)
    filled = [torch.zeros_like(leaf) if each is None else each for each, leaf in zip(gradients, leaves, strict=True)]
    return [each.detach().double().cpu() for each in (loss, *filled)]


def errors(found: list[Tensor], truth: list[Tensor], case: Case) -> list[float]:
    """Relative errors in the Euclidean norm. Norms below a hundredth of an easy batch's scale count as that."""
    floors = [0.01 * max(1.0, case.scale / 5), *[0.01 * case.scale / len(case.query)] * 2, 0.1, 0.01 * case.scale]
    return [
        float((one - other).norm() / other.norm().clamp(min=floor)) if one.numel() else 0.0
        for one, other, floor in zip(found, truth, floors, strict=False)
    ]


def normalized(side: Tensor) -> Tensor:
    return side / side.norm(dim=1, keepdim=True)


def _loss(
    case: Case, q: Tensor, k: Tensor, scale: Tensor, own: Tensor | None, frozen: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    arguments, negatives, p = case.arguments, case.negatives, case.positive
    rows, c = torch.arange(len(q)), q @ k.T
    positives = arguments.get("positives")
    known = torch.zeros(c.shape, dtype=torch.bool)
    known[rows, p] = True
    if positives is not None:
        known[positives.pairs.unbind(1)] = True
    ids = arguments.get("passage_ids")
    query_ids = None if ids is None else ids[p] if arguments.get("query_ids") is None else arguments["query_ids"]
    removed = _removed(case, c.detach(), rows, ids, query_ids) & ~known
    s, hardness = scale * c, negatives.hardness
    weighted = torch.where(known, s, s + hardness * c.detach())
    others = [
        (scale * x, hardness * x.detach(), there)
        for x, there in _others(case, q, k, c, removed, own, frozen, ids, query_ids)
    ]
    further = torch.cat([torch.where(there, x + w, -torch.inf) for x, w, there in others], 1) if others else s[:, :0]
    if positives is None:
        entries = weighted.masked_fill(removed, -torch.inf)
        loss = (torch.cat([entries, further], 1).logsumexp(1) - s[rows, p]).mean()
        if arguments["symmetric"] and not negatives.same_side:
            loss = (loss + (entries.logsumexp(0)[p] - s[rows, p]).mean()) / 2
    else:
        kept = weighted.masked_fill(known | removed, -torch.inf)
        loss = _several(s, torch.cat([kept, further], 1), known, positives.reduction)
        if arguments["symmetric"]:
            loss = (loss + _several(s.T, kept.T, known.T, positives.reduction)) / 2
    return loss + _distillation(arguments.get("teacher"), s, removed), _statistics(s, weighted, known, removed, p)


def _removed(case: Case, c: Tensor, rows: Tensor, ids: Tensor | None, query_ids: Tensor | None) -> Tensor:
    removed, p = torch.zeros(c.shape, dtype=torch.bool), case.positive
    if case.arguments.get("excluded") is not None:
        removed[case.arguments["excluded"].unbind(1)] = True
    if ids is not None and query_ids is not None:
        removed |= query_ids[:, None] == ids
    mine, limit, guide = c[rows, p][:, None], case.negatives.limit, case.negatives.guide
    if limit is not None and limit.margin is not None:
        removed |= c > mine + limit.margin
    if limit is not None and limit.share is not None:
        removed |= c > mine - (1 - limit.share) * mine.abs()
    if guide is not None:
        g = guide.query.double() @ guide.passage.double().T
        removed |= g > g[rows, p][:, None] - guide.margin
    return removed


def _others(
    case: Case, q: Tensor, k: Tensor, c: Tensor, removed: Tensor, own: Tensor | None, frozen: Tensor | None,
    ids: Tensor | None, query_ids: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """(products, whether the row has them) of what is added to the row sums."""
    negatives, p, found = case.negatives, case.positive, []
    if own is not None and negatives.own is not None:
        number, offsets = torch.arange(len(own)), negatives.own.offsets
        found.append((q @ own.T, (number >= offsets[:-1, None]) & (number < offsets[1:, None])))
    if frozen is not None:
        there = torch.ones(len(q), len(frozen), dtype=torch.bool)
        if negatives.frozen_excluded is not None:
            there[negatives.frozen_excluded.unbind(1)] = False
        found.append((q @ frozen.T, there))
    if negatives.same_side:
        mine = torch.arange(len(q)) if query_ids is None else query_ids
        found.append((q @ q.T, mine[:, None] != mine))
    if negatives.same_side and case.arguments["symmetric"]:
        number = torch.arange(len(k)) if ids is None else ids
        found += [(c[:, p].T, ~removed[:, p].T), (k[p] @ k.T, number[p][:, None] != number)]
    return found


def _several(s: Tensor, negatives: Tensor, known: Tensor, reduction: str) -> Tensor:
    losses = []
    for scores, others, mine in zip(s, negatives, known, strict=True):
        if not mine.any():
            continue
        top = scores[mine]
        if reduction == "sum":
            losses.append(torch.cat([top, others]).logsumexp(0) - top.logsumexp(0))
        else:
            losses.append(torch.stack([torch.cat([x[None], others]).logsumexp(0) - x for x in top]).mean())
    return torch.stack(losses).mean()


def _distillation(teacher: Teacher | TeacherScores | None, s: Tensor, removed: Tensor) -> Tensor:
    if teacher is None:
        return s.new_zeros(())
    if isinstance(teacher, Teacher):
        theirs = (teacher.scale * teacher.query.double() @ teacher.passage.double().T).masked_fill(removed, -torch.inf)
        ours = s.masked_fill(removed, -torch.inf).log_softmax(1).masked_fill(removed, 0)
        theirs = theirs.log_softmax(1)
        return teacher.weight * (theirs.exp() * (theirs.masked_fill(removed, 0) - ours)).sum(1).mean()
    terms = [s.new_zeros(())]
    for row, (start, stop) in enumerate(itertools.pairwise(teacher.offsets.tolist())):
        ours, theirs = s[row, teacher.passages[start:stop]], teacher.scale * teacher.scores[start:stop].double()
        if stop - start < 2:
            continue
        if teacher.kind == "kl":
            terms.append((theirs.softmax(0) * (theirs.log_softmax(0) - ours.log_softmax(0))).sum())
        else:
            terms.append(((ours[0] - ours[1:] - theirs[0] + theirs[1:]) ** 2).mean())
    return teacher.weight * torch.stack(terms).sum() / len(s)


@torch.no_grad()
def _statistics(s: Tensor, weighted: Tensor, known: Tensor, removed: Tensor, p: Tensor) -> dict[str, Tensor]:
    negative = ~(known | removed)
    rank = 1 + (negative & (s > s[torch.arange(len(s)), p][:, None])).sum(1)
    score, hardest = s.masked_fill(~negative, -torch.inf).max(1)
    log = weighted.masked_fill(removed, -torch.inf).log_softmax(1)
    return {
        "rank": rank,
        "hardest": torch.where(negative.any(1), hardest, -1),
        "hardest_score": score,
        "entropy": -(log.exp() * log.masked_fill(removed, 0)).sum(1),
        "masked": removed.sum(1),
        "accuracy": (rank == 1).double().mean(),
        "mrr": (1 / rank.double()).mean(),
        "masked_share": removed.double().mean(),
    }
