"""The Matryoshka loss equals the weighted sum of losses of normalized prefixes, in every implementation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from losses import InfCLLoss, inf_cl_loss
from losses.option_checks.objective import Prefixes
from losses.options import Matryoshka
from losses.triton.launch import interpreted
from losses.triton.matryoshka.layout import PrefixLayout
from losses.triton.matryoshka.setup import MatryoshkaSetup

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU instead")
DEVICES = [pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]


def batch(queries: int, passages: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float64 embeddings of different lengths; passage i is similar to query i."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, dims, dtype=torch.float64, generator=generator)
    passage = torch.randn(passages, dims, dtype=torch.float64, generator=generator)
    passage[:queries] += 0.5 * query[:passages]
    return query, passage * torch.linspace(0.5, 3, passages, dtype=torch.float64)[:, None]


def step(query: Tensor, passage: Tensor, logit_scale: float, **options: Any) -> list[Tensor]:
    """Loss and gradients of query, passage and logit_scale, in float64 on the CPU."""
    leaves = [side.detach().requires_grad_() for side in (query, passage)]
    wide = torch.promote_types(query.dtype, torch.float32)
    leaves.append(torch.tensor(logit_scale, dtype=wide, device=query.device, requires_grad=True))
    options = {name: each.to(query.device) if isinstance(each, Tensor) else each for name, each in options.items()}
    loss = inf_cl_loss(leaves[0], leaves[1], logit_scale=leaves[2], **options)
    return [each.double().cpu() for each in (loss.detach(), *torch.autograd.grad(loss, leaves))]


def errors(
    query: Tensor, passage: Tensor, logit_scale: float, dtype: torch.dtype, device: str, **options: Any
) -> list[float]:
    """Relative errors against the definition in float64, of embeddings rounded to `dtype`."""
    query, passage = query.to(dtype), passage.to(dtype)
    how = {name: options.pop(name) for name in ("implementation", "precision", "workspace_mib") if name in options}
    truth = step(query.double(), passage.double(), logit_scale, implementation="full", **options)
    found = step(query.to(device), passage.to(device), logit_scale, **how, **options)
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


def masks(queries: int, passages: int) -> dict[str, Tensor]:
    """Positives, ids and excluded pairs."""
    generator = torch.Generator().manual_seed(1)
    positive = torch.randint(passages, (queries,), generator=generator)
    rows, columns = (torch.randint(size, (12,), generator=generator) for size in (queries, passages))
    return {
        "positive": positive,
        "passage_ids": torch.arange(passages) % 7,
        "excluded": torch.stack([rows, columns], 1)[columns != positive[rows]],
    }


@pytest.mark.parametrize("symmetric", [False, True])
def test_reference_is_the_weighted_sum_of_losses_of_normalized_prefixes(symmetric: bool) -> None:
    query, passage = batch(9, 13, 12)
    dims, weights = (3, 7, 12), (0.5, 1.0, 2.0)
    expected = 0.0
    for size, weight in zip(dims, weights, strict=True):
        scores = 7 * normalize(query[:, :size], dim=1) @ normalize(passage[:, :size], dim=1).T
        loss = cross_entropy(scores, torch.arange(9))
        if symmetric:
            loss = (loss + cross_entropy(scores.T[:9], torch.arange(9))) / 2
        expected += weight * float(loss)
    options = {"symmetric": symmetric, "matryoshka": Matryoshka(dims, weights)}
    found = inf_cl_loss(query, passage, logit_scale=7.0, implementation="full", **options)
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("symmetric", "masked", "logit_scale"), itertools.product([False, True], [False, True], [20.0, 300.0])
)
@pytest.mark.parametrize("dims", [(3, 8, 17, 29), (5, 16), (29,)])
def test_tiles_equal_the_reference(dims: tuple[int, ...], symmetric: bool, masked: bool, logit_scale: float) -> None:
    query, passage = batch(23, 41, 29)
    weights = [1.5 - 0.3 * place for place in range(len(dims))]
    options = {"symmetric": symmetric, "matryoshka": Matryoshka(dims, weights), **(masks(23, 41) if masked else {})}
    tiles = {"implementation": "chunked", "workspace_mib": 0.02}
    assert max(errors(query, passage, logit_scale, torch.float64, "cpu", **tiles, **options)) <= 1e-12
    assert max(errors(query, passage, logit_scale, torch.float32, "cpu", **tiles, **options)) <= 5e-6
    if logit_scale < 100:
        assert max(errors(query, passage, logit_scale, torch.bfloat16, "cpu", **tiles, **options)) <= 6e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dims", "symmetric", "masked", "logit_scale"),
    [
        ((3, 8, 17, 29), True, False, 20.0),
        ((3, 8, 17, 29), False, True, 20.0),
        ((5, 16), True, True, 20.0),
        ((3, 8, 17, 29), True, True, 300.0),  # no constant shift is safe
        ((29,), True, False, 20.0),
    ],
)
def test_kernels_equal_the_reference(
    dims: tuple[int, ...], symmetric: bool, masked: bool, logit_scale: float, device: str
) -> None:
    query, passage = batch(37, 53, 29)
    options = {"symmetric": symmetric, "matryoshka": Matryoshka(dims), **(masks(37, 53) if masked else {})}
    found = errors(
        query, passage, logit_scale, torch.float32, device, implementation="triton", workspace_mib=0.05, **options
    )
    assert max(found) <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_our_products_of_slices_equal_those_of_the_library(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MatryoshkaSetup, "own_products_bytes", 4)
    # More than one block of gradients, and partial tiles.
    query, passage = batch(131, 150, 70)
    options = {"symmetric": True, "matryoshka": Matryoshka((20, 33, 64)), "workspace_mib": 0.02}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found = errors(query, passage, 20.0, dtype, device, implementation="triton", **options)
    assert max(found) <= (1e-5 if device == "cpu" else 6e-3)


@pytest.mark.parametrize("implementation", ["full", "chunked", "triton"])
def test_one_row_and_one_size_of_all_columns(implementation: str) -> None:
    query, passage = (normalize(side, dim=1) for side in batch(1, 1, 7))
    loss, *gradients = step(
        query.float(), passage.float(), 9.0, matryoshka=Matryoshka((2, 7)), implementation=implementation
    )
    assert abs(float(loss)) <= 1e-6 and all(float(each.norm()) <= 1e-5 for each in gradients)
    query, passage = (normalize(side, dim=1) for side in batch(11, 13, 7))
    whole = step(query, passage, 9.0, symmetric=True, implementation="full")
    nested = step(
        query.float(), passage.float(), 9.0, symmetric=True, matryoshka=Matryoshka((7,)), implementation=implementation
    )
    assert float(nested[0]) == pytest.approx(float(whole[0]), rel=1e-5)
    # The gradient is that of the normalized row: without the part along the row.
    for place, side in ((1, query), (2, passage)):
        across = whole[place] - (whole[place] * side).sum(1, keepdim=True) * side
        torch.testing.assert_close(nested[place], across, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_a_prefix_of_zeros_has_scores_of_zero_and_no_gradient(implementation: str) -> None:
    query, passage = batch(9, 11, 8)
    query[2, :3] = 0
    passage[5, :3] = 0
    options = {"symmetric": True, "matryoshka": Matryoshka((3, 8)), "implementation": implementation}
    assert max(errors(query, passage, 12.0, torch.float32, "cpu", **options)) <= 1e-5
    gradient = step(query.float(), passage.float(), 12.0, matryoshka=Matryoshka((3,)), implementation=implementation)[1]
    assert gradient[2].abs().max() == 0 and gradient[:, 3:].abs().max() == 0


def test_values_that_are_not_finite_give_a_loss_that_is_not_finite() -> None:
    for implementation, value in itertools.product(("full", "chunked", "triton"), (torch.nan, torch.inf)):
        query, passage = (side.float() for side in batch(5, 6, 8))
        passage[4, 2] = value
        loss = inf_cl_loss(
            query, passage, logit_scale=5.0, matryoshka=Matryoshka((4, 8)), implementation=implementation
        )
        assert not loss.isfinite()


def test_a_second_backward_gives_the_same_and_a_second_derivative_is_refused() -> None:
    query, passage = (side.float().requires_grad_() for side in batch(9, 12, 8))
    loss = inf_cl_loss(query, passage, logit_scale=5.0, matryoshka=Matryoshka((4, 8)), symmetric=True)
    first = torch.autograd.grad(loss, (query, passage), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, (query, passage), retain_graph=True), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, query, create_graph=True)


@pytest.mark.parametrize(
    ("named", "matryoshka"),
    [
        ("matryoshka must be a Matryoshka, found tuple", (2, 4)),
        ("matryoshka.dims must be whole numbers", Matryoshka(())),
        ("matryoshka.dims must be whole numbers", Matryoshka((2.0, 4))),
        ("matryoshka.dims must be positive and increasing", Matryoshka((4, 2))),
        ("matryoshka.dims must be positive and increasing", Matryoshka((0, 2))),
        ("matryoshka.dims must be at most the embeddings' 4 dimensions, found 5", Matryoshka((2, 5))),
        ("matryoshka.weights must be 2 numbers", Matryoshka((2, 4), (1.0,))),
        ("matryoshka.weights must be finite", Matryoshka((2, 4), (1.0, float("nan")))),
    ],
)
def test_wrong_sizes_are_refused_by_name(named: str, matryoshka: Any) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        inf_cl_loss(torch.ones(3, 4), torch.ones(5, 4), logit_scale=1.0, matryoshka=matryoshka)


def test_the_dense_kernels_refuse_matryoshka_by_name() -> None:
    with pytest.raises(ValueError, match="'dense' does not support matryoshka"):
        inf_cl_loss(
            torch.ones(3, 4), torch.ones(5, 4), logit_scale=1.0, matryoshka=Matryoshka((2,)), implementation="dense"
        )


def test_the_module_passes_its_sizes_on() -> None:
    query, passage = (side.float() for side in batch(7, 9, 8))
    criterion = InfCLLoss(logit_scale=6.0, symmetric=True, matryoshka=Matryoshka((3, 8)))
    found = criterion(query, passage)
    expected = inf_cl_loss(query, passage, logit_scale=6.0, symmetric=True, matryoshka=Matryoshka((3, 8)))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert criterion.log_logit_scale.grad is not None


def test_packed_slices_begin_at_steps_and_hold_all_columns() -> None:
    for dims, step_size in (((128, 256, 512, 768), 64), ((3, 8, 17, 29), 16), ((96, 100), 16), ((64,), 64)):
        layout = PrefixLayout.of(Prefixes(dims, (1.0,) * len(dims)), 64)
        assert layout.step == step_size and all(start % layout.step == 0 for start in layout.starts)
        side = torch.arange(2.0 * (dims[-1] + 3)).view(2, -1) + 1
        packed = layout.pack(side, "fp32")
        assert packed.shape == (2, layout.width)
        found = [
            packed[:, s : s + c.stop - c.start] for s, c in zip(layout.starts, layout.prefixes.slices, strict=True)
        ]
        assert torch.equal(torch.cat(found, 1), side[:, : dims[-1]])
        assert float(packed.sum()) == float(side[:, : dims[-1]].sum())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "precision", "allowed"),
    [
        (torch.bfloat16, "bf16", 4e-3),
        (torch.float16, "auto", 2e-3),
        (torch.float32, "tf32", 2e-3),
        (torch.float32, "fp32", 1e-5),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_errors_of_the_matryoshka_kernels_on_the_gpu(
    dtype: torch.dtype, precision: str, allowed: float, symmetric: bool
) -> None:
    for queries, passages, width, dims in (
        (257, 263, 65, (16, 65)),
        (1024, 1536, 768, (128, 256, 512, 768)),
        (1031, 1100, 384, (32, 64, 128, 256, 384)),
    ):
        query, passage = batch(queries, passages, width)
        found = errors(
            query, passage, 50.0, dtype, "cuda", implementation="triton", precision=precision, workspace_mib=16,
            symmetric=symmetric, matryoshka=Matryoshka(dims),
        )  # fmt: skip
        assert found[0] <= 1e-4 and max(found[1:3]) <= allowed, (dims, found)


@pytest.mark.gpu
@pytest.mark.parametrize("logit_scale", [50.0, 300.0])
def test_masked_matryoshka_kernels_on_the_gpu(logit_scale: float) -> None:
    query, passage = batch(700, 901, 256)
    found = errors(
        query, passage, logit_scale, torch.bfloat16, "cuda", implementation="triton", workspace_mib=4, symmetric=True,
        matryoshka=Matryoshka((64, 128, 256)), **masks(700, 901),
    )  # fmt: skip
    assert found[0] <= 1e-3 and max(found[1:3]) <= 4e-3 * max(1, logit_scale / 60)


@pytest.mark.gpu
def test_matryoshka_kernels_are_deterministic_and_do_not_synchronize() -> None:
    query, passage = (side.bfloat16().cuda() for side in batch(600, 700, 256))
    scale = torch.tensor(30.0, device="cuda", requires_grad=True)
    results = []
    for attempt in range(3):
        leaves = [side.detach().requires_grad_() for side in (query, passage)]
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            loss = inf_cl_loss(
                leaves[0], leaves[1], logit_scale=scale, symmetric=True, matryoshka=Matryoshka((64, 256)),
                implementation="triton",
            )  # fmt: skip
            results.append((loss.detach(), *torch.autograd.grad(loss, (*leaves, scale))))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(again, results[0], strict=True))
