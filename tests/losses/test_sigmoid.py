"""The sigmoid loss against its definition in float64: value and all four gradients, in every implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from losses import sigmoid_loss
from losses.inputs import ContrastiveBatch
from losses.triton import shapes
from losses.triton.launch import interpreted
from losses.triton.sigmoid import fused_sigmoid_loss, sigmoid_values_op

TINY_MIB = 2**-7  # 8 KiB: many tiles, the last ones partial
NAMES = ("loss", "query", "passage", "logit_scale", "logit_bias")
# Only then do kernels run on CPU tensors; tests/losses/test_sigmoid_gpu.py runs them on a GPU.
interpreted_only = pytest.mark.skipif(not interpreted(), reason="kernels run on a CPU under Triton's interpreter")
TILED = ["chunked", pytest.param("triton", marks=interpreted_only)]


def embeddings(queries: int, passages: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float64 unit vectors; passage i is similar to query i."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, dims, dtype=torch.float64, generator=generator)
    passage = torch.randn(passages, dims, dtype=torch.float64, generator=generator)
    shared = min(queries, passages)
    passage[:shared] += query[:shared]
    return normalize(query, dim=1), normalize(passage, dim=1)


def value_and_gradients(
    query: Tensor, passage: Tensor, scale: float, bias: float, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """The loss of embeddings cast to `dtype`, and its gradients for an upstream gradient of 0.7."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [side.detach().to(dtype).requires_grad_() for side in (query, passage)]
    leaves += [torch.tensor(number, dtype=wide, requires_grad=True) for number in (scale, bias)]
    loss = sigmoid_loss(leaves[0], leaves[1], logit_scale=leaves[2], logit_bias=leaves[3], **options)
    gradients = torch.autograd.grad(loss, leaves, torch.tensor(0.7, dtype=loss.dtype))
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    return dict(zip(NAMES, (each.detach().double() for each in (loss, *gradients)), strict=True))


def assert_close_to_float64(
    implementation: Any, query: Tensor, passage: Tensor, scale: float = 10.0, bias: float = -10.0,
    dtype: torch.dtype = torch.float32, tolerance: float = 3e-6, **options: Any,
) -> None:  # fmt: skip
    query, passage = query.to(dtype).double(), passage.to(dtype).double()
    known = {name: value for name, value in options.items() if name not in ("precision", "workspace_mib")}
    truth = value_and_gradients(query, passage, scale, bias, torch.float64, implementation="full", **known)
    options = {"workspace_mib": TINY_MIB, "implementation": implementation} | options
    found = value_and_gradients(query, passage, scale, bias, dtype, **options)
    # The gradient of the scale is a sum of positive and negative terms that cancel; their rounding errors remain.
    products = query @ passage.T
    terms = float((products.abs() * torch.sigmoid(scale * products + bias)).sum()) / len(query)
    terms += float(products.abs().amax(1).mean())
    for name, oracle in truth.items():
        allowed = tolerance * float(oracle.norm()) + tolerance / 30 * terms * (name == "logit_scale")
        error = float((found[name] - oracle).norm())
        assert error <= allowed, f"{name} is off by {error / float(oracle.norm())}"


@pytest.mark.parametrize("implementation", ["full", *TILED])
def test_the_definition_of_open_clip(implementation: Any) -> None:
    """open_clip's SigLipLoss: labels 2I − 1, −logsigmoid(labels · logits).sum() / batch size."""
    query, passage = (side.float() for side in embeddings(13, 13, 8))
    logits = 10.0 * query @ passage.T - 9.0
    labels = 2 * torch.eye(13) - 1
    expected = -logsigmoid(labels * logits).sum() / 13
    found = sigmoid_loss(query, passage, logit_scale=10.0, logit_bias=-9.0, implementation=implementation)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", ["full", *TILED])
@pytest.mark.parametrize(
    ("queries", "passages", "dims"),
    [(1, 1, 1), (1, 37, 5), (2, 3, 1), (31, 31, 13), (29, 97, 17), (64, 64, 64), (67, 131, 40)],
)
def test_any_size(implementation: Any, queries: int, passages: int, dims: int) -> None:
    assert_close_to_float64(implementation, *embeddings(queries, passages, dims))


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize(("scale", "bias"), [(0.0, 0.0), (100.0, -10.0), (1e-3, 5.0), (-7.0, 3.0), (60.0, 60.0),
                                             (10.0, -80.0), (3.0, 90.0)])  # fmt: skip
def test_any_scale_and_bias(implementation: Any, scale: float, bias: float) -> None:
    """Relative to the loss, to which negatives add almost nothing at a bias of −80, and to each gradient."""
    assert_close_to_float64(implementation, *embeddings(37, 53, 16), scale, bias, tolerance=1e-5)


@pytest.mark.parametrize("implementation", TILED)
def test_small_terms_are_not_rounded_away(implementation: Any) -> None:
    """41 terms of 1e-10 per query; each is lost if it is added to 1 before the logarithm."""
    query, passage = torch.zeros(40, 8), torch.zeros(80, 8)
    query[:, 0], passage[:40, 0] = 1.0, 1.0
    passage[40:, 0] = -1.0
    loss = sigmoid_loss(
        query, passage, logit_scale=23.0, logit_bias=0.0, implementation=implementation,
        query_ids=torch.zeros(40, dtype=torch.int64), passage_ids=(torch.arange(80) >= 40).long(),
    )  # fmt: skip
    assert float(loss) == pytest.approx(41 * math.log1p(math.exp(-23.0)), rel=1e-5)


@pytest.mark.parametrize("implementation", TILED)
def test_unnormalized_embeddings(implementation: Any) -> None:
    query, passage = embeddings(23, 41, 16)
    assert_close_to_float64(implementation, query * 7, passage * 5, 10.0, -3.0, tolerance=1e-5)


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize("case", ["permuted", "shared", "masked", "shared and masked", "all alike"])
def test_positives_and_ids(implementation: Any, case: str) -> None:
    query, passage = embeddings(37, 53, 16)
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {}
    if case == "permuted":
        options["positive"] = torch.randperm(53, generator=generator)[:37].int()
    if "shared" in case:
        options["positive"] = torch.randint(9, (37,), generator=generator)
    if "masked" in case:
        options["passage_ids"] = torch.randint(-4, 4, (53,), generator=generator)
    if case == "masked":
        options["query_ids"] = torch.randint(-4, 9, (37,), generator=generator) * 2**40
        options["passage_ids"] *= 2**40
    if case == "all alike":
        options["passage_ids"] = torch.full((53,), 7)
    assert_close_to_float64(implementation, query, passage, **options)


@pytest.mark.parametrize("implementation", ["full", *TILED])
def test_bf16_rounds_the_operands(implementation: Any) -> None:
    query, passage = embeddings(37, 53, 16)
    assert_close_to_float64(implementation, query, passage, dtype=torch.bfloat16, tolerance=4e-3)
    # The scores are those of the rounded embeddings to float32 accuracy.
    query, passage = query.bfloat16(), passage.bfloat16()
    options: dict[str, Any] = {"logit_scale": 50.0, "logit_bias": -10.0}
    loss = sigmoid_loss(query, passage, implementation=implementation, **options)
    truth = sigmoid_loss(query.double(), passage.double(), implementation="full", **options)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(truth), rel=1e-6)


@pytest.mark.parametrize("implementation", TILED)
def test_float16_gradients_with_a_loss_scale(implementation: Any) -> None:
    """Every derivative, and every gradient before the loss scale is applied, is below the smallest float16 value."""
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    query, passage = (basis[:rows].half().requires_grad_() for rows in (37, 53))
    exact = [side.detach().double().requires_grad_() for side in (query, passage)]
    options: dict[str, Any] = {"logit_scale": 40.0, "logit_bias": -20.0}
    (sigmoid_loss(query, passage, implementation=implementation, **options) * 2**24).backward()
    (sigmoid_loss(*exact, implementation="full", **options) * 2**24).backward()
    for ours, theirs in ((query, exact[0]), (passage, exact[1])):
        assert ours.grad is not None and theirs.grad is not None
        assert float(theirs.grad.abs().max()) < 2**24 * 2**-24
        assert float((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < 1e-3


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize("dims", [5, 40])
def test_float16(implementation: Any, dims: int) -> None:
    assert_close_to_float64(implementation, *embeddings(37, 53, dims), dtype=torch.float16, tolerance=1e-3)
    assert_close_to_float64(
        implementation, *embeddings(37, 53, dims), dtype=torch.float16, tolerance=1e-3,
        positive=torch.arange(37) // 8, passage_ids=torch.arange(53) // 4,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 3e-6), ("tf32", 1e-3), ("bf16", 8e-3)])
def test_precisions_of_float32_embeddings(implementation: Any, precision: str, tolerance: float) -> None:
    assert_close_to_float64(implementation, *embeddings(37, 53, 24), precision=precision, tolerance=tolerance)


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize("workspace_mib", [2**-10, 2**-5, 256])
def test_any_workspace(implementation: Any, workspace_mib: float) -> None:
    """In the kernel's path, blocks of scores start at multiples of 128, so several blocks need more rows."""
    assert_close_to_float64(implementation, *embeddings(150, 270, 8), workspace_mib=workspace_mib)
    positive = torch.arange(150).flip(0) + 100
    assert_close_to_float64(implementation, *embeddings(150, 270, 8), workspace_mib=workspace_mib, positive=positive,
                 passage_ids=torch.arange(270) % 50)  # fmt: skip


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_uninitialized_memory_is_read(dtype: torch.dtype) -> None:
    """With NaN in all new memory, the results have the same bits."""
    query, passage = embeddings(150, 270, 13)
    options: dict[str, Any] = {"workspace_mib": TINY_MIB, "implementation": "triton"}
    plain = value_and_gradients(query, passage, 10.0, -10.0, dtype, **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        filled = value_and_gradients(query, passage, 10.0, -10.0, dtype, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(plain[name], filled[name]) for name in NAMES)


@interpreted_only
def test_persistent_programs_compute_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "PERSISTENT_KERNEL", "sigmoid")
    assert shapes.tile_shape("sigmoid", 40, torch.float32, "ieee", torch.device("cpu")).persistent
    assert_close_to_float64("triton", *embeddings(67, 131, 40))


@interpreted_only
def test_compiled_into_one_graph_equals_eager() -> None:
    """The custom operator also returns the shapes and dtypes that its fake implementation declares."""
    query, passage = (side.half() for side in embeddings(29, 31, 8))
    positive = torch.arange(29)

    def loss_of(query: Tensor, passage: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # The public function reads the values of CPU tensors, which a compiled graph cannot do.
        batch = ContrastiveBatch(query, passage, scale, positive, None, None, symmetric=True, diagonal=True)
        return fused_sigmoid_loss(batch, bias, "tf32", 2**13)

    def value_and_gradients_of(loss_of: Any) -> list[Tensor]:
        leaves = [query.clone().requires_grad_(), passage.clone().requires_grad_()]
        leaves += [torch.tensor(10.0, requires_grad=True), torch.tensor(-9.0, requires_grad=True)]
        loss = loss_of(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(value_and_gradients_of(compiled), value_and_gradients_of(loss_of), strict=True):
        assert ours.dtype == eager.dtype and torch.equal(ours, eager)
    for wanted in ([True] * 4, [False] * 4, [False, False, True, False]):
        arguments = (query, passage, torch.tensor(10.0), torch.tensor(-9.0), positive, positive, torch.arange(31))
        torch.library.opcheck(
            sigmoid_values_op,
            (*arguments, torch.tensor([[0, 3]]), True, "tf32", 2**13, wanted, False, 0),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_float64_is_exact() -> None:
    query, passage = embeddings(37, 53, 16)
    assert_close_to_float64("chunked", query, passage, dtype=torch.float64, tolerance=1e-13)


@pytest.mark.parametrize("implementation", TILED)
def test_strided_views(implementation: Any) -> None:
    query, passage = embeddings(37, 53, 16)
    wide = torch.stack([passage, torch.full_like(passage, torch.nan)], 1)
    leaves = [query.T.contiguous().float().requires_grad_(), wide.float().requires_grad_()]
    loss = sigmoid_loss(leaves[0].T, leaves[1][:, 0], logit_scale=9.0, logit_bias=-8.0, implementation=implementation)
    (loss * 0.7).backward()
    truth = value_and_gradients(query.float(), passage.float(), 9.0, -8.0, torch.float64, implementation="full")
    assert leaves[0].grad is not None and leaves[1].grad is not None
    found = {"loss": loss, "query": leaves[0].grad.T, "passage": leaves[1].grad[:, 0]}
    for name, each in found.items():
        torch.testing.assert_close(each.detach().double(), truth[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["full", *TILED])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_embeddings_make_the_loss_nan(implementation: Any, bad: float, side: int) -> None:
    """Also if the ids mask every pair of the passage."""
    pair = [each.float() for each in embeddings(19, 37, 8)]
    pair[side][-1, 3] = bad
    options: dict[str, Any] = {"logit_scale": 10.0, "logit_bias": -10.0, "implementation": implementation}
    for leaves in (pair, [each.clone().requires_grad_() for each in pair]):
        assert sigmoid_loss(*leaves, **options).isnan()
        assert sigmoid_loss(*leaves, passage_ids=torch.zeros(37, dtype=torch.int64), **options).isnan()


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(implementation: Any, wanted: int) -> None:
    query, passage = embeddings(29, 31, 8)
    every = value_and_gradients(query, passage, 10.0, -9.0, torch.float32, implementation=implementation)
    leaves = [query.float(), passage.float(), torch.tensor(10.0), torch.tensor(-9.0)]
    leaves[wanted].requires_grad_()
    loss = sigmoid_loss(leaves[0], leaves[1], logit_scale=leaves[2], logit_bias=leaves[3],
                        implementation=implementation)  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, leaves[wanted], torch.tensor(0.7))
    torch.testing.assert_close(gradient.double(), every[NAMES[1 + wanted]], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("implementation", TILED)
def test_the_value_does_not_depend_on_requires_grad(implementation: Any) -> None:
    query, passage = (side.float().requires_grad_() for side in embeddings(29, 31, 8))
    options: dict[str, Any] = {"logit_scale": 10.0, "logit_bias": -9.0, "implementation": implementation}
    loss = sigmoid_loss(query, passage, **options)
    with torch.no_grad():
        plain = sigmoid_loss(query, passage, **options)
    assert loss.requires_grad and not plain.requires_grad
    assert loss.item() == plain.item()


@pytest.mark.parametrize("implementation", TILED)
def test_backward_can_run_twice_but_second_derivatives_raise(implementation: Any) -> None:
    query, passage = (side.float().requires_grad_() for side in embeddings(7, 9, 8))
    loss = sigmoid_loss(query, passage, logit_scale=10.0, logit_bias=-9.0, implementation=implementation)
    first = torch.autograd.grad(loss, query, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, query, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, query, create_graph=True)
