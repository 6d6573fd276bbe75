"""The sigmoid loss against its definition in float64: its value and all four gradients, however it is computed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from losses import SigmoidLoss, sigmoid_loss

TINY_MIB = 2**-7  # 8 KiB: many tiles, the last ones partial
QUERY, PASSAGE = torch.ones(3, 4), torch.ones(5, 4)
NAMES = ("loss", "query", "passage", "logit_scale", "logit_bias")
TILED = ["chunked"]


def embeddings(queries: int, passages: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float64 unit vectors; each of the first passages resembles its query."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, dims, dtype=torch.float64, generator=generator)
    passage = torch.randn(passages, dims, dtype=torch.float64, generator=generator)
    shared = min(queries, passages)
    passage[:shared] += query[:shared]
    return normalize(query, dim=1), normalize(passage, dim=1)


def value_and_gradients(
    query: Tensor, passage: Tensor, scale: float, bias: float, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """The loss of embeddings cast to `dtype`, and its gradients under an upstream gradient that is not one."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [side.detach().to(dtype).requires_grad_() for side in (query, passage)]
    leaves += [torch.tensor(number, dtype=wide, requires_grad=True) for number in (scale, bias)]
    loss = sigmoid_loss(leaves[0], leaves[1], logit_scale=leaves[2], logit_bias=leaves[3], **options)
    gradients = torch.autograd.grad(loss, leaves, torch.tensor(0.7, dtype=loss.dtype))
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    return dict(zip(NAMES, (each.detach().double() for each in (loss, *gradients)), strict=True))


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    for name, oracle in truth.items():
        error = float((found[name] - oracle).norm() / oracle.norm().clamp(min=1e-30))
        assert error <= tolerance, f"{name} is off by {error}"


def assert_right(
    implementation: str, query: Tensor, passage: Tensor, scale: float = 10.0, bias: float = -10.0,
    dtype: torch.dtype = torch.float32, tolerance: float = 3e-6, **options: Any,
) -> None:  # fmt: skip
    query, passage = query.to(dtype).double(), passage.to(dtype).double()
    truth = value_and_gradients(query, passage, scale, bias, torch.float64, implementation="full", **options)
    options = {"workspace_mib": TINY_MIB, "implementation": implementation} | options
    assert_close(value_and_gradients(query, passage, scale, bias, dtype, **options), truth, tolerance)


def test_the_oracle_is_the_definition_of_open_clip() -> None:
    """open_clip's SigLipLoss: labels 2I − 1, −logsigmoid(labels · logits).sum() / batch size."""
    query, passage = embeddings(13, 13, 8)
    logits = 10.0 * query @ passage.T - 9.0
    labels = 2 * torch.eye(13, dtype=torch.float64) - 1
    expected = -logsigmoid(labels * logits).sum() / 13
    for implementation in ("full", "chunked"):
        found = sigmoid_loss(query, passage, logit_scale=10.0, logit_bias=-9.0, implementation=implementation)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", ["full", *TILED])
@pytest.mark.parametrize(
    ("queries", "passages", "dims"),
    [(1, 1, 1), (1, 37, 5), (2, 3, 1), (31, 31, 13), (29, 97, 17), (64, 64, 64), (67, 131, 40)],
)
def test_any_size(implementation: str, queries: int, passages: int, dims: int) -> None:
    assert_right(implementation, *embeddings(queries, passages, dims))


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize(("scale", "bias"), [(0.0, 0.0), (100.0, -10.0), (1e-3, 5.0), (-7.0, 3.0), (60.0, 60.0),
                                             (10.0, -80.0), (3.0, 90.0)])  # fmt: skip
def test_any_scale_and_bias(implementation: str, scale: float, bias: float) -> None:
    """Relative to the loss, to which at a bias of −80 the terms of negatives add nothing, and to each gradient."""
    assert_right(implementation, *embeddings(37, 53, 16), scale, bias, tolerance=1e-5)


@pytest.mark.parametrize("implementation", TILED)
def test_terms_far_below_a_rounding_of_one_count(implementation: str) -> None:
    """41 terms of 1e-10 a query, each of which is lost when it is added to one before its logarithm is taken."""
    query, passage = torch.zeros(40, 8), torch.zeros(80, 8)
    query[:, 0], passage[:40, 0] = 1.0, 1.0
    passage[40:, 0] = -1.0
    loss = sigmoid_loss(
        query, passage, logit_scale=23.0, logit_bias=0.0, implementation=implementation,
        query_ids=torch.zeros(40, dtype=torch.int64), passage_ids=(torch.arange(80) >= 40).long(),
    )  # fmt: skip
    assert float(loss) == pytest.approx(41 * math.log1p(math.exp(-23.0)), rel=1e-5)


@pytest.mark.parametrize("implementation", TILED)
def test_unnormalised_embeddings(implementation: str) -> None:
    query, passage = embeddings(23, 41, 16)
    assert_right(implementation, query * 7, passage * 5, 10.0, -3.0, tolerance=1e-5)


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize("case", ["permuted", "shared", "masked", "shared and masked", "all alike"])
def test_positives_and_ids(implementation: str, case: str) -> None:
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
    assert_right(implementation, query, passage, **options)


@pytest.mark.parametrize("implementation", ["full", *TILED])
def test_bf16_rounds_the_operands(implementation: str) -> None:
    query, passage = embeddings(37, 53, 16)
    assert_right(implementation, query, passage, dtype=torch.bfloat16, tolerance=4e-3)
    # The scores are those of the rounded embeddings to float32 accuracy.
    query, passage = query.bfloat16(), passage.bfloat16()
    options: dict[str, Any] = {"logit_scale": 50.0, "logit_bias": -10.0}
    loss = sigmoid_loss(query, passage, implementation=implementation, **options)
    truth = sigmoid_loss(query.double(), passage.double(), implementation="full", **options)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(truth), rel=1e-6)


@pytest.mark.parametrize("implementation", TILED)
def test_a_loss_scale_lifts_float16_gradients(implementation: str) -> None:
    """Gradients far below float16's smallest number come back when the upstream gradient makes them large."""
    query, passage = (side.half().requires_grad_() for side in embeddings(37, 53, 16))
    exact = [side.detach().double().requires_grad_() for side in (query, passage)]
    loss = sigmoid_loss(query, passage, logit_scale=1.0, logit_bias=-25.0, implementation=implementation,
                        passage_ids=torch.arange(53))  # fmt: skip
    (loss * 2**20).backward()
    truth = sigmoid_loss(*exact, logit_scale=1.0, logit_bias=-25.0, implementation="full")
    (truth * 2**20).backward()
    for ours, theirs in ((query, exact[0]), (passage, exact[1])):
        assert ours.grad is not None and theirs.grad is not None
        assert float((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < 2e-3


def test_float64_is_exact() -> None:
    query, passage = embeddings(37, 53, 16)
    assert_right("chunked", query, passage, dtype=torch.float64, tolerance=1e-13)


@pytest.mark.parametrize("implementation", TILED)
def test_views_are_read_as_they_stand(implementation: str) -> None:
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
def test_what_is_not_finite_makes_the_loss_nan(implementation: str, bad: float, side: int) -> None:
    """Also where the ids leave every pair of the passage out."""
    pair = [each.float() for each in embeddings(19, 37, 8)]
    pair[side][-1, 3] = bad
    options: dict[str, Any] = {"logit_scale": 10.0, "logit_bias": -10.0, "implementation": implementation}
    for leaves in (pair, [each.clone().requires_grad_() for each in pair]):
        assert sigmoid_loss(*leaves, **options).isnan()
        assert sigmoid_loss(*leaves, passage_ids=torch.zeros(37, dtype=torch.int64), **options).isnan()


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(implementation: str, wanted: int) -> None:
    query, passage = embeddings(29, 31, 8)
    every = value_and_gradients(query, passage, 10.0, -9.0, torch.float32, implementation=implementation)
    leaves = [query.float(), passage.float(), torch.tensor(10.0), torch.tensor(-9.0)]
    leaves[wanted].requires_grad_()
    loss = sigmoid_loss(leaves[0], leaves[1], logit_scale=leaves[2], logit_bias=leaves[3],
                        implementation=implementation)  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, leaves[wanted], torch.tensor(0.7))
    torch.testing.assert_close(gradient.double(), every[NAMES[1 + wanted]], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("implementation", TILED)
def test_without_a_gradient_the_value_is_the_same(implementation: str) -> None:
    query, passage = (side.float().requires_grad_() for side in embeddings(29, 31, 8))
    options: dict[str, Any] = {"logit_scale": 10.0, "logit_bias": -9.0, "implementation": implementation}
    loss = sigmoid_loss(query, passage, **options)
    with torch.no_grad():
        plain = sigmoid_loss(query, passage, **options)
    assert loss.requires_grad and not plain.requires_grad
    assert loss.item() == plain.item()


@pytest.mark.parametrize("implementation", TILED)
def test_the_graph_can_be_walked_twice_but_not_differentiated_twice(implementation: str) -> None:
    query, passage = (side.float().requires_grad_() for side in embeddings(7, 9, 8))
    loss = sigmoid_loss(query, passage, logit_scale=10.0, logit_bias=-9.0, implementation=implementation)
    first = torch.autograd.grad(loss, query, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, query, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, query, create_graph=True)


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("query must be a tensor", {"query": [[1.0]]}),
        ("passage has 6 dimensions, query has 4", {"passage": torch.ones(5, 6)}),
        ("logit_scale must be finite, found nan", {"logit_scale": math.nan}),
        ("logit_bias must be finite, found -inf", {"logit_bias": -math.inf}),
        ("logit_bias must be finite, found nan", {"logit_bias": torch.tensor(math.nan)}),
        ("logit_bias must be a number", {"logit_bias": "-10"}),
        ("logit_bias must be a number", {"logit_bias": False}),
        ("logit_bias must be a number", {"logit_bias": torch.ones(1)}),
        ("logit_bias must be a number", {"logit_bias": torch.tensor(3)}),
        ("logit_bias is on meta", {"logit_bias": torch.ones((), device="meta")}),
        ("positive must index the 5 passages, found 5", {"positive": torch.tensor([0, 5, 2])}),
        ("passage_ids must have shape [5], found [3]", {"passage_ids": torch.arange(3)}),
        ("group must be None", {"group": object()}),
        ("precision must be one of auto, fp32, tf32, bf16", {"precision": "fp8"}),
        ("implementation must be one of auto, full, chunked", {"implementation": "fastest"}),
        ("workspace_mib must be a positive number of MiB, found 0", {"workspace_mib": 0}),
    ],
)
def test_what_does_not_fit_is_named(named: str, changed: dict[str, Any]) -> None:
    arguments = {"query": QUERY, "passage": PASSAGE, "logit_scale": 10.0, "logit_bias": -10.0} | changed
    with pytest.raises(ValueError, match="^" + re.escape(named)) as refused:
        sigmoid_loss(arguments.pop("query"), arguments.pop("passage"), **arguments)
    assert "\n" not in str(refused.value)


def test_module_begins_as_siglip_and_learns_scale_and_bias() -> None:
    query, passage = (side.float() for side in embeddings(9, 9, 8))
    module = SigmoidLoss()
    assert float(module.logit_scale.detach()) == pytest.approx(10.0)
    assert float(module.logit_bias.detach()) == -10.0
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    sigmoid_loss(query, passage, logit_scale=scale, logit_bias=bias).backward()
    module(query, passage).backward()
    assert module.log_logit_scale.grad is not None and scale.grad is not None
    assert float(module.log_logit_scale.grad) == pytest.approx(10.0 * float(scale.grad), rel=1e-5)
    torch.testing.assert_close(module.logit_bias.grad, bias.grad)
    assert list(module.state_dict()) == ["log_logit_scale", "logit_bias"]
    assert not any(each.requires_grad for each in SigmoidLoss(learnable=False).parameters())


def test_a_clamped_scale_stays_at_the_clamp_and_comes_back() -> None:
    module = SigmoidLoss(max_logit_scale=50.0)
    with torch.no_grad():
        module.log_logit_scale.fill_(math.log(80.0))
    assert float(module.logit_scale.detach()) == pytest.approx(50.0)
    matched = torch.eye(2)
    module(matched, matched).backward()
    assert float(module.log_logit_scale.grad) == 0, "a larger scale is not asked for above the clamp"
    module(matched, matched.flip(0)).backward()
    assert float(module.log_logit_scale.grad) > 0
    for arguments in ({"logit_scale": 0.0}, {"logit_scale": 101.0}, {"logit_bias": math.inf}, {"max_logit_scale": -1}):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            SigmoidLoss(**arguments)
