"""Batches with `positives`, `negatives` and `statistics`, and their loss by its definition, entry by entry."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from losses import Guide, NegativeLimit, Negatives, Positives, Ragged, Statistics, inf_cl_loss

FEATURES: dict[str, dict[str, Any]] = {
    "none": {},
    "mean": {"positives": "mean"},
    "sum": {"positives": "sum"},
    "margin": {"limit": NegativeLimit(margin=0.05)},
    "below": {"limit": NegativeLimit(margin=-0.1)},
    "share": {"limit": NegativeLimit(share=0.8999)},
    "guide": {"guide": 0.05},
    "hardness": {"hardness": 2.0},
    "all mean": {"positives": "mean", "limit": NegativeLimit(0.2, 1.1001), "guide": -0.1, "hardness": 1.5},
    "all sum": {"positives": "sum", "limit": NegativeLimit(0.1), "guide": -0.2, "hardness": 0.5},
}


def case(
    feature: str,
    queries: int,
    passages: int,
    *,
    random_positive: bool = False,
    excluded: bool = False,
    ids: bool = False,
    dims: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    exact: bool = False,
) -> dict[str, Any]:
    """Arguments of the loss. Embeddings are float64 unit vectors, rounded to `dtype`; statistics are wanted.

    With `exact`, their components are small multiples of a power of two: products are exact in every precision, so
    that comparisons of scores, which `limit`, `guide` and statistics make, have one result. No threshold of FEATURES
    is a sum or multiple of such products.
    """
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int, width: int) -> Tensor:
        if exact:
            steps = torch.randint(-2, 3, (rows, width), generator=generator).double()
            return steps * 2.0 ** -math.ceil(math.log2(2 * width) / 2)
        vectors = torch.randn(rows, width, dtype=torch.float64, generator=generator)
        return normalize(vectors, dim=1).to(dtype).double()

    wanted = FEATURES[feature]
    positive = torch.randint(passages, (queries,), generator=generator) if random_positive else torch.arange(queries)
    rows, columns = (torch.randint(size, (2 * queries,), generator=generator) for size in (queries, passages))
    pairs = torch.stack([rows, columns], 1)
    # Repeated pairs, and pairs of queries with their own positives, count once.
    further = torch.cat([pairs[:queries], pairs[:2], torch.stack([torch.arange(queries), positive], 1)[:3]])
    given: dict[str, Any] = {
        "query": unit(queries, dims),
        "passage": unit(passages, dims),
        "positive": positive if random_positive else None,
        "statistics": True,
    }
    known = {tuple(pair) for pair in further.tolist()} if "positives" in wanted else set()
    if "positives" in wanted:
        given["positives"] = Positives(further, wanted["positives"])
    if excluded:
        others = pairs[queries:]
        keep = [j != positive[i] and (i, j) not in known for i, j in others.tolist()]
        given["excluded"] = others[torch.tensor(keep)]
    if ids:
        given["passage_ids"] = torch.arange(passages) % 17
    guide = Guide(unit(queries, 5), unit(passages, 5), wanted["guide"]) if "guide" in wanted else None
    if wanted.keys() - {"positives"}:
        given["negatives"] = Negatives(limit=wanted.get("limit"), guide=guide, hardness=wanted.get("hardness", 0.0))
    return given


def moved(given: dict[str, Any], device: str) -> dict[str, Any]:
    """The arguments with all tensors on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, Positives | Negatives | Guide | Ragged):
            return replace(value, **{each.name: move(getattr(value, each.name)) for each in fields(value)})
        return value

    return {name: move(value) for name, value in given.items()}


def run(
    given: dict[str, Any], logit_scale: float, dtype: torch.dtype, device: str = "cpu", loss: Any = inf_cl_loss
) -> tuple[list[Tensor], Statistics | None]:
    """Value and gradients of query, passage and logit_scale in float64, and the statistics if wanted."""
    given = moved(given, device)
    leaves = [given.pop(side).detach().to(dtype).requires_grad_() for side in ("query", "passage")]
    wide = torch.promote_types(dtype, torch.float32)
    leaves.append(torch.tensor(logit_scale, dtype=wide, device=device, requires_grad=True))
    found = loss(*leaves[:2], logit_scale=leaves[2], **given)
    value, statistics = found if given.get("statistics") else (found, None)
    gradients = torch.autograd.grad(0.7 * value, leaves)
    return [each.double().cpu() for each in (value.detach(), *gradients)], statistics


def assert_close(found: list[Tensor], truth: list[Tensor], allowed: float, score_error: float = 0.0) -> None:
    """Compare value and gradients. The value is a difference of scores, each of which may be off by `score_error`."""
    for place, (ours, theirs) in enumerate(zip(found, truth, strict=True)):
        error = float((ours - theirs).norm())
        most = allowed * float(theirs.norm()) + 1e-6 * allowed**0.5 + (score_error if place == 0 else 0.0)
        assert error <= most, (place, error, float(theirs.norm()))


def assert_same_statistics(found: Statistics | None, truth: Statistics | None, allowed: float) -> None:
    assert found is not None and truth is not None
    for field in fields(Statistics):
        ours, theirs = (getattr(each, field.name).cpu() for each in (found, truth))
        assert ours.shape == theirs.shape and not ours.requires_grad, field.name
        if not theirs.is_floating_point():
            assert ours.dtype == torch.int64 and torch.equal(ours, theirs), (field.name, ours, theirs)
            continue
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=allowed, atol=allowed, msg=field.name)


def definition(given: dict[str, Any], scale: float, symmetric: bool) -> tuple[float, dict[str, list[float]]]:
    """The loss and the statistics by their definitions, with loops over the entries."""
    query, passage = given["query"], given["passage"]
    queries, passages = len(query), len(passage)
    c = query @ passage.T
    own = given["positive"].tolist() if given["positive"] is not None else list(range(queries))
    positives = given.get("positives")
    negatives = given.get("negatives") or Negatives()
    known = {(i, j) for i, j in enumerate(own)}
    if positives is not None:
        known |= {tuple(pair) for pair in positives.pairs.tolist()}
    excluded = {tuple(pair) for pair in given["excluded"].tolist()} if given.get("excluded") is not None else set()
    ids = given["passage_ids"].tolist() if given.get("passage_ids") is not None else None
    guided = negatives.guide.query @ negatives.guide.passage.T if negatives.guide else None

    def removed(i: int, j: int) -> bool:
        mine = float(c[i, own[i]])
        limit = negatives.limit
        return (
            (i, j) in excluded
            or (ids is not None and ids[j] == ids[own[i]])
            or (limit is not None and limit.margin is not None and c[i, j] > mine + limit.margin)
            or (limit is not None and limit.share is not None and c[i, j] > mine - (1 - limit.share) * abs(mine))
            or (guided is not None and guided[i, j] > guided[i, own[i]] - negatives.guide.margin)
        )

    s = [[scale * float(c[i, j]) for j in range(passages)] for i in range(queries)]
    left = {(i, j) for i in range(queries) for j in range(passages) if (i, j) not in known and not removed(i, j)}
    term = {(i, j): math.exp(negatives.hardness * float(c[i, j])) * math.exp(s[i][j]) for i, j in left}

    def direction(lines: list[list[tuple[int, int]]]) -> list[float]:
        losses = []
        for line in lines:
            mine = [entry for entry in line if entry in known]
            if not mine:
                continue
            total = sum(term[entry] for entry in line if entry in term)
            scores = [s[i][j] for i, j in mine]
            if positives is not None and positives.reduction == "sum":
                top = sum(math.exp(score) for score in scores)
                losses.append(math.log(top + total) - math.log(top))
            elif positives is not None:
                each = [math.log(math.exp(score) + total) - score for score in scores]
                losses.append(sum(each) / len(each))
            else:
                top = sum(math.exp(score) for score in scores)
                losses.extend(math.log(top + total) - score for score in scores)
        return losses

    rows = direction([[(i, j) for j in range(passages)] for i in range(queries)])
    loss = sum(rows) / len(rows)
    if symmetric:
        columns = direction([[(i, j) for i in range(queries)] for j in range(passages)])
        loss = (loss + sum(columns) / len(columns)) / 2
    statistics: dict[str, list[float]] = {name: [] for name in ("rank", "hardest", "entropy", "masked")}
    for i in range(queries):
        mine = [j for j in range(passages) if (i, j) in left]
        statistics["rank"].append(1 + sum(s[i][j] > s[i][own[i]] for j in mine))
        statistics["hardest"].append(max(mine, key=lambda j: s[i][j], default=-1))
        weights = [term[i, j] for j in mine] + [math.exp(s[i][j]) for j in range(passages) if (i, j) in known]
        statistics["entropy"].append(-sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights))
        statistics["masked"].append(sum((i, j) not in left and (i, j) not in known for j in range(passages)))
    return loss, statistics
