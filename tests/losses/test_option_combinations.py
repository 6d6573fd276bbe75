"""Every pair of options works, with the values and gradients of the float64 reference, or is refused by name."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from negatives_batch import Batch, relative_errors
from option_cases import moved

from losses import (
    Guide,
    InfCLLoss,
    Matryoshka,
    NegativeLimit,
    Negatives,
    Positives,
    Ragged,
    SigmoidLoss,
    Teacher,
    inf_cl_loss,
)
from losses.triton.launch import interpreted

MASKED = ("positives", "limit", "guide", "hardness", "statistics")
OUTSIDE = ("own", "frozen", "same_side")
OBJECTIVES = ("matryoshka", "teacher")
NAMES = (*MASKED, *OUTSIDE, *OBJECTIVES)
REFUSED = {
    frozenset(pair)
    for pair in [
        *itertools.product(("positives", "limit", "guide", "hardness"), ["same_side"]),
        *itertools.product(["teacher"], ("positives", "limit", "guide", "hardness", *OUTSIDE)),
    ]
}
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU instead")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
PAIRS = list(itertools.combinations(NAMES, 2))
COMBINED = [pair for pair in PAIRS if frozenset(pair) not in REFUSED]
BATCH = Batch.random(19, 27, masks=True, random_positive=True)


def public(name: str) -> str:
    return name if name in ("positives", "statistics", *OBJECTIVES) else f"negatives.{name}"


def arguments(names: tuple[str, ...], own: torch.Tensor, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of the loss for options; `own` are the values of own negatives."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)

    queries, passages = len(BATCH.query), len(BATCH.passage)
    guide, teacher = (Guide(drawn(queries, 5), drawn(passages, 5)), Teacher(drawn(queries, 5), drawn(passages, 5), 3.0))
    assert BATCH.positive is not None
    further = torch.stack([torch.arange(queries), (BATCH.positive + 5) % passages], 1)
    if BATCH.excluded is not None:
        keys, known = (pairs[:, 0] * passages + pairs[:, 1] for pairs in (further, BATCH.excluded))
        further = further[~torch.isin(keys, known)]
    of_negatives = {
        "limit": NegativeLimit(margin=0.05),
        "guide": guide,
        "hardness": 1.5,
        "own": Ragged(own, BATCH.offsets),
        "frozen": BATCH.frozen.to(dtype),
        "same_side": True,
    }
    found: dict[str, Any] = {"negatives": Negatives(**{n: v for n, v in of_negatives.items() if n in names})}
    others = {
        "positives": Positives(further),
        "statistics": True,
        "matryoshka": Matryoshka((4, 12)),
        "teacher": teacher,
    }
    return found | {name: value for name, value in others.items() if name in names}


def run(
    names: tuple[str, ...], dtype: torch.dtype, masks: bool, device: str = "cpu", **options: Any
) -> tuple[list[torch.Tensor], Any]:
    """Value and gradients of query, passage, logit_scale and own negatives in float64, and statistics or None."""
    sides = (BATCH.query, BATCH.passage, torch.tensor(9.0, dtype=torch.float64), BATCH.own)
    leaves = [side.detach().to(dtype).requires_grad_() for side in sides]
    if masks:
        options |= {"passage_ids": BATCH.passage_ids, "excluded": BATCH.excluded}
    options |= {"positive": BATCH.positive, "logit_scale": leaves[2]} | arguments(names, leaves[3], dtype)
    found = inf_cl_loss(*(side.to(device) for side in leaves[:2]), **moved(options, device))
    loss, statistics = found if "statistics" in names else (found, None)
    gradients = torch.autograd.grad(0.7 * loss, leaves, allow_unused=True)
    return [each.double().cpu() for each in (loss.detach(), *gradients) if each is not None], statistics


def assert_same(one: Any, other: Any, allowed: float) -> None:
    for field in fields(one):
        ours, theirs = (getattr(each, field.name).double().cpu() for each in (one, other))
        torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed, msg=field.name)


@pytest.mark.parametrize("names", COMBINED, ids="-".join)
def test_tiles_with_two_options_equal_the_full_matrix(names: tuple[str, ...]) -> None:
    for symmetric, masks in itertools.product([False, True], repeat=2):
        truth, expected = run(names, torch.float64, masks, symmetric=symmetric, implementation="full")
        for dtype, allowed in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
            options: dict[str, Any] = {"symmetric": symmetric, "implementation": "chunked", "workspace_mib": 0.01}
            found, statistics = run(names, dtype, masks, **options)
            assert max(relative_errors(found, truth)) <= allowed, (symmetric, masks, dtype)
            if statistics is not None:
                assert_same(statistics, expected, max(allowed, 1e-9))


@pytest.mark.parametrize("names", COMBINED, ids="-".join)
def test_neither_of_two_options_is_ignored(names: tuple[str, ...]) -> None:
    both, _ = run(names, torch.float64, False, implementation="chunked")
    for one in names:
        if one == "statistics":
            continue
        without, _ = run(tuple(name for name in names if name != one), torch.float64, False, implementation="chunked")
        assert abs(float(both[0] - without[0])) > 1e-6, one


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "names", [("positives", "limit", "guide", "own", "frozen", "statistics"), ("limit", "own"), ("positives", "frozen")]
)
def test_kernels_with_several_options_equal_the_full_matrix(names: tuple[str, ...], device: str) -> None:
    pytest.importorskip("triton")
    for symmetric in (False, True):
        truth, expected = run(names, torch.float64, True, symmetric=symmetric, implementation="full")
        found, statistics = run(names, torch.float32, True, device, symmetric=symmetric, implementation="triton")
        assert max(relative_errors(found, truth)) <= 2e-5, symmetric
        if statistics is not None:
            assert_same(statistics, expected, 2e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_own_and_frozen_negatives_beside_positives_follow_the_definition(reduction: Any) -> None:
    batch = Batch.random(6, 9, frozen=4, masks=False, random_positive=False)
    further = [(0, 7), (0, 8), (3, 1)]
    negatives = Negatives(own=Ragged(batch.own, batch.offsets), frozen=batch.frozen, limit=NegativeLimit(margin=-0.2))
    c, losses = batch.query @ batch.passage.T, []
    for i in range(6):
        mine = [i, *(j for k, j in further if k == i)]
        kept = [j for j in range(9) if j not in mine and c[i, j] <= c[i, i] - 0.2]
        outside = torch.cat([batch.own[batch.offsets[i] : batch.offsets[i + 1]], batch.frozen]) @ batch.query[i]
        total = float((5 * c[i, kept]).exp().sum() + (5 * outside).exp().sum())
        top = [math.exp(5 * float(c[i, p])) for p in mine]
        if reduction == "sum":
            losses.append(math.log(1 + total / sum(top)))
        else:
            losses.append(sum(math.log(1 + total / each) for each in top) / len(top))
    for implementation in ("full", "chunked"):
        found = inf_cl_loss(
            batch.query, batch.passage, logit_scale=5.0, negatives=negatives, implementation=implementation,
            positives=Positives(torch.tensor(further), reduction),
        )  # fmt: skip
        assert float(found) == pytest.approx(sum(losses) / 6, rel=1e-12)


def test_rows_without_a_negative_in_the_batch_have_those_outside() -> None:
    # A limit that removes every negative: the sums of the tiles are zero, and the shifts minus infinity.
    query, passage = BATCH.query[:5].clone().requires_grad_(), BATCH.passage[:5].clone().requires_grad_()
    for symmetric, scale in itertools.product([False, True], [5.0, 300.0]):
        results = []
        for implementation in ("full", "chunked"):
            negatives = Negatives(limit=NegativeLimit(margin=-3.0), frozen=BATCH.frozen)
            loss = inf_cl_loss(
                query, passage, logit_scale=scale, negatives=negatives, implementation=implementation,
                symmetric=symmetric,
            )  # fmt: skip
            results.append([loss.detach(), *torch.autograd.grad(loss, (query, passage))])
        assert max(relative_errors(*results)) <= 1e-10


def test_statistics_are_those_of_the_batch_beside_negatives_outside_it() -> None:
    _, alone = run(("statistics", "limit"), torch.float64, True, implementation="chunked")
    _, beside = run(("statistics", "limit", "own", "frozen"), torch.float64, True, implementation="chunked")
    assert_same(beside, alone, 0.0)


@pytest.mark.parametrize("names", sorted(tuple(sorted(pair)) for pair in REFUSED), ids="-".join)
def test_what_does_not_combine_is_refused_by_name(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="does not combine with") as refused:
        run(names, torch.float64, False)
    message = str(refused.value)
    assert message.startswith(tuple(f"{public(name)} " for name in names)) and "\n" not in message
    assert all(public(name) in message for name in names)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "statistics"])
def test_the_dense_loss_refuses_options_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^implementation 'dense' does not support {public(name)}"):
        run((name,), torch.float64, False, implementation="dense")


def test_the_compiler_leaves_combined_options_out_of_its_graph() -> None:
    names = ("positives", "limit", "own", "frozen")

    def loss(query: torch.Tensor) -> torch.Tensor:
        given = arguments(names, BATCH.own)
        return 2 * inf_cl_loss(2 * query, BATCH.passage, logit_scale=5.0, positive=BATCH.positive, **given)

    query = BATCH.query.clone().requires_grad_()
    expected, found = (call(query) for call in (loss, torch.compile(loss, backend="aot_eager")))
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, query), torch.autograd.grad(expected, query), strict=True):
        torch.testing.assert_close(one, other)


def test_modules_take_every_option() -> None:
    given = arguments(("limit", "own", "positives"), BATCH.own)
    loss = InfCLLoss(logit_scale=9.0)(BATCH.query, BATCH.passage, positive=BATCH.positive, **given)
    expected, _ = run(("limit", "own", "positives"), torch.float64, False)
    assert float(loss.detach()) == pytest.approx(float(expected[0]), rel=1e-6)
    with pytest.raises(ValueError, match=r"negatives\.own does not apply to the sigmoid loss"):
        SigmoidLoss()(BATCH.query, BATCH.passage, positive=BATCH.positive, negatives=given["negatives"])
