"""Excluded pairs are removed from row and column sums in every implementation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from losses import InfCLLoss, SigmoidLoss, inf_cl_loss, sigmoid_loss
from losses.triton.launch import interpreted

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU instead")
DEVICES = [pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
IMPLEMENTATIONS = ["full", "dense", "chunked", "triton"]


def batch(
    queries: int, passages: int, pairs: int, *, random_positive: bool, dims: int = 12, seed: int = 0
) -> dict[str, Any]:
    """float64 unit vectors, positives (the diagonal unless `random_positive`), and excluded pairs with duplicates."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(rows, dims, dtype=torch.float64, generator=generator) for rows in (queries, passages)]
    positive = torch.randint(passages, (queries,), generator=generator) if random_positive else torch.arange(queries)
    rows, columns = (torch.randint(size, (pairs,), generator=generator) for size in (queries, passages))
    excluded = torch.stack([rows, columns], 1)[columns != positive[rows]]
    return {
        "query": normalize(sides[0], dim=1),
        "passage": normalize(sides[1], dim=1),
        "positive": positive if random_positive else None,
        "excluded": torch.cat([excluded, excluded[:3]]),
    }


def run(loss: Any, numbers: tuple[float, ...], dtype: torch.dtype, device: str, given: dict[str, Any]) -> list[Tensor]:
    """The loss and its gradients with respect to query, passage, logit_scale and, for the sigmoid loss, logit_bias."""
    given = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in given.items()}
    leaves = [given.pop(side).detach().to(dtype).requires_grad_() for side in ("query", "passage")]
    wide = torch.promote_types(dtype, torch.float32)
    leaves += [torch.tensor(number, dtype=wide, device=device, requires_grad=True) for number in numbers]
    names = ("logit_scale", "logit_bias")[: len(numbers)]
    value = loss(*leaves[:2], **dict(zip(names, leaves[2:], strict=True)), **given)
    return [each.double().cpu() for each in (value.detach(), *torch.autograd.grad(value, leaves))]


def assert_close(found: list[Tensor], truth: list[Tensor], allowed: float) -> None:
    for place, (ours, theirs) in enumerate(zip(found, truth, strict=True)):
        assert (ours - theirs).norm() <= allowed * theirs.norm() + 1e-6, (place, ours.norm(), theirs.norm())


def definition(given: dict[str, Any], logit_scale: float, symmetric: bool) -> float:
    """The loss by its definition, entry by entry."""
    scores = logit_scale * given["query"] @ given["passage"].T
    queries, passages = scores.shape
    positive = given["positive"].tolist() if given["positive"] is not None else list(range(queries))
    removed = {tuple(pair) for pair in given["excluded"].tolist()}
    losses = []
    for i, own in enumerate(positive):
        row = torch.stack([scores[i, j] for j in range(passages) if (i, j) not in removed])
        losses.append(row.logsumexp(0) - scores[i, own])
        if symmetric:
            column = torch.stack([scores[k, own] for k in range(queries) if (k, own) not in removed])
            losses.append(column.logsumexp(0) - scores[i, own])
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(("symmetric", "random_positive"), itertools.product([False, True], repeat=2))
def test_excluded_pairs_are_left_out_of_row_and_column_sums(symmetric: bool, random_positive: bool) -> None:
    given = batch(9, 14, 40, random_positive=random_positive)
    loss = inf_cl_loss(**given, logit_scale=7.0, symmetric=symmetric, implementation="full")
    assert float(loss) == pytest.approx(definition(given, 7.0, symmetric), rel=1e-12)
    without = inf_cl_loss(**{**given, "excluded": None}, logit_scale=7.0, symmetric=symmetric, implementation="full")
    assert abs(float(loss - without)) > 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["dense", "chunked", "triton"])
@pytest.mark.parametrize("logit_scale", [20.0, 500.0])  # one shift, running maxima
def test_every_implementation_equals_the_full_matrix(logit_scale: float, implementation: str, device: str) -> None:
    shapes = [(131, 157, 24), (1, 7, 9)] if device == "cpu" else [(131, 157, 200), (1, 7, 9), (700, 1500, 4000)]
    for (queries, passages, pairs), symmetric in itertools.product(shapes, [False, True]):
        # Covers ids together with excluded pairs, and default and random positives.
        random_positive = symmetric != (logit_scale == 20.0)
        given = batch(queries, passages, pairs, random_positive=random_positive) | {"symmetric": symmetric}
        if random_positive:
            given["passage_ids"] = torch.arange(passages) % 31
        truth = run(inf_cl_loss, (logit_scale,), torch.float64, "cpu", given | {"implementation": "full"})
        settings = {"implementation": implementation, "workspace_mib": 0.1}
        # The rounding error of a score grows with the scale.
        allowed = 2e-5 if logit_scale == 20 else 1e-3
        assert_close(run(inf_cl_loss, (logit_scale,), torch.float32, device, given | settings), truth, allowed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workspace_mib", [0.1, 64.0])  # recomputed, kept
def test_kept_and_recomputed_exponentials_exclude_pairs(workspace_mib: float, device: str) -> None:
    given = batch(131, 157, 24, random_positive=False) | {"symmetric": True}
    given = {name: each.bfloat16().double() if name in ("query", "passage") else each for name, each in given.items()}
    truth = run(inf_cl_loss, (20.0,), torch.float64, "cpu", given | {"implementation": "full"})
    given |= {"implementation": "triton", "workspace_mib": workspace_mib}
    loss, *gradients = run(inf_cl_loss, (20.0,), torch.bfloat16, device, given)
    assert_close([loss], truth[:1], 1e-4)
    assert_close(gradients, truth[1:], 5e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_cells_wider_than_a_tile_give_the_same_result(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # With millions of rows, narrow cells would outnumber the rows, so cells become wider than a tile.
    from losses.triton.kernels import excluded

    given = batch(140, 200, 8, random_positive=False) | {"symmetric": True, "implementation": "triton"}
    narrow = run(inf_cl_loss, (20.0,), torch.float32, device, given)
    monkeypatch.setattr(excluded, "MAX_CELLS_PER_EMBEDDING", 0.006)
    assert excluded.Cells.of(140, 200) == excluded.Cells(row_cells=2, column_cells=1, cell_bits=8)
    for found, expected in zip(run(inf_cl_loss, (20.0,), torch.float32, device, given), narrow, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_the_sigmoid_loss_excludes_pairs(implementation: str, device: str) -> None:
    given = batch(70, 90, 20, random_positive=False)
    truth = run(sigmoid_loss, (10.0, -3.0), torch.float64, "cpu", given | {"implementation": "full"})
    x = 10 * given["query"] @ given["passage"].T - 3
    sign = 2 * torch.eye(70, 90) - 1
    losses = -torch.nn.functional.logsigmoid(sign * x)
    losses[given["excluded"].unbind(1)] = 0
    assert float(truth[0]) == pytest.approx(float(losses.sum() / 70), rel=1e-12)
    given |= {"implementation": implementation, "workspace_mib": 0.1}
    assert_close(run(sigmoid_loss, (10.0, -3.0), torch.float32, device, given), truth, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pairs_that_ids_would_mask_give_the_loss_with_ids(implementation: str) -> None:
    given = batch(20, 30, 0, random_positive=False)
    ids = torch.arange(30) % 13
    masked = (ids[:20, None] == ids[None]) & ~torch.eye(20, 30, dtype=torch.bool)
    options = {"symmetric": True, "implementation": implementation}
    by_ids = run(inf_cl_loss, (20.0,), torch.float32, "cpu", {**given, **options, "excluded": None, "passage_ids": ids})
    by_pairs = run(inf_cl_loss, (20.0,), torch.float32, "cpu", {**given, **options, "excluded": masked.nonzero()})
    assert_close(by_pairs, by_ids, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_without_negatives_has_no_row_loss(implementation: str) -> None:
    given = batch(4, 6, 0, random_positive=False)
    everything = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    given["excluded"] = everything[everything[:, 0] != everything[:, 1]]
    for symmetric in (False, True):
        options = {"symmetric": symmetric, "implementation": implementation}
        for each in run(inf_cl_loss, (20.0,), torch.float32, "cpu", given | options):
            assert each.abs().max() <= 1e-6


def test_an_empty_list_of_pairs_equals_none() -> None:
    given = batch(5, 8, 0, random_positive=True)
    loss = inf_cl_loss(**given, logit_scale=5.0)
    assert torch.equal(loss, inf_cl_loss(**{**given, "excluded": None}, logit_scale=5.0))


@pytest.mark.parametrize("loss", [inf_cl_loss, sigmoid_loss, InfCLLoss(), SigmoidLoss()])
@pytest.mark.parametrize(
    ("excluded", "message"),
    [
        ([[0, 1]], "excluded must be an integer tensor, found list"),
        (torch.zeros(1, 2), "excluded must be a tensor of int64, found torch.float32"),
        (torch.zeros(4, dtype=torch.int64), r"excluded must have shape \[pairs, 2\], found \[4\]"),
        (torch.zeros(4, 3, dtype=torch.int64), r"excluded must have shape \[pairs, 2\], found \[4, 3\]"),
        (torch.tensor([[0, 1], [4, 0]]), r"rows of 4 queries and 6 passages, found \[4, 0\]"),
        (torch.tensor([[-1, 1]]), r"rows of 4 queries and 6 passages, found \[-1, 1\]"),
        (torch.tensor([[0, 6]]), r"rows of 4 queries and 6 passages, found \[0, 6\]"),
        (torch.tensor([[0, 1], [2, 2]]), r"must not hold a query's own positive, found \[2, 2\]"),
    ],
)
def test_invalid_pairs_are_refused(loss: Any, excluded: Any, message: str) -> None:
    query, passage = torch.randn(4, 3), torch.randn(6, 3)
    numbers = {} if isinstance(loss, torch.nn.Module) else {"logit_scale": 1.0}
    if loss is sigmoid_loss:
        numbers["logit_bias"] = 0.0
    with pytest.raises(ValueError, match=message):
        loss(query, passage, excluded=excluded, **numbers)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pair", [[0, 6], [-1, 0], [4, 0], [2, 2], [2**40, 2**40]])
def test_an_invalid_pair_on_a_gpu_makes_the_loss_nan(pair: list[int], implementation: Any) -> None:
    query, passage = (torch.randn(rows, 8, device="cuda") for rows in (4, 6))
    for positive in (None, torch.arange(4, device="cuda")):
        options = {"positive": positive, "implementation": implementation, "logit_scale": 5.0}
        excluded = torch.tensor([[0, 1], pair], device="cuda")
        assert inf_cl_loss(query, passage, excluded=excluded, **options).isnan()
        assert inf_cl_loss(query, passage, excluded=excluded[:1], **options).isfinite()
        if implementation != "dense":
            options["logit_bias"] = 0.0
            assert sigmoid_loss(query, passage, excluded=excluded, **options).isnan()
            assert sigmoid_loss(query, passage, excluded=excluded[:1], **options).isfinite()


@pytest.mark.gpu
def test_a_step_with_excluded_pairs_does_not_synchronize() -> None:
    given = {name: each.cuda() for name, each in batch(300, 500, 200, random_positive=True).items()}
    query, passage = (given.pop(side).float().requires_grad_() for side in ("query", "passage"))
    options = {"logit_scale": torch.tensor(10.0, device="cuda"), "symmetric": True, **given}
    for implementation in ("dense", "chunked", "triton"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            inf_cl_loss(query, passage, implementation=implementation, **options).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
