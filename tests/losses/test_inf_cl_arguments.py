"""Argument errors of inf_cl_loss, InfCLLoss and clip_loss, and the precision that the inputs give."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from losses import InfCLLoss, SigmoidLoss, clip_loss, inf_cl_loss
from losses.precision import resolve_precision

QUERY, PASSAGE = torch.ones(3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("query must be a tensor", {"query": [[1.0]]}),
        ("query must be a non-empty matrix", {"query": torch.ones(4)}),
        ("query must be a non-empty matrix", {"query": torch.ones(0, 4)}),
        ("query must be float32", {"query": torch.ones(3, 4, dtype=torch.int64)}),
        ("passage must be a non-empty matrix", {"passage": torch.ones(5, 4, 1)}),
        ("passage must be float32", {"passage": torch.ones(5, 4, dtype=torch.complex64)}),
        ("passage has 6 dimensions, query has 4", {"passage": torch.ones(5, 6)}),
        ("passage is torch.float16, query is torch.float32", {"passage": PASSAGE.half()}),
        ("passage is on meta, query is on cpu", {"passage": PASSAGE.to("meta")}),
        ("passage has 2 rows, fewer than the 3 queries", {"passage": torch.ones(2, 4)}),
        ("logit_scale must be finite in float32, found nan", {"logit_scale": math.nan}),
        ("logit_scale must be finite in float32, found 1e+39", {"logit_scale": 1e39}),
        ("logit_scale must be finite in float32, found 1000", {"logit_scale": 10**400}),
        ("logit_scale must be finite in float32, found 1e+300",
         {"logit_scale": torch.tensor(1e300, dtype=torch.float64)}),
        ("logit_scale must be finite in float32, found inf", {"logit_scale": torch.tensor(math.inf)}),
        ("logit_scale must be a number", {"logit_scale": "20"}),
        ("logit_scale must be a number", {"logit_scale": True}),
        ("logit_scale must be a number", {"logit_scale": torch.ones(1)}),
        ("logit_scale must be a number", {"logit_scale": torch.tensor(3)}),
        ("logit_scale is on meta", {"logit_scale": torch.ones((), device="meta")}),
        ("positive must be an integer tensor, found list", {"positive": [0, 1, 2]}),
        ("positive must be a tensor of int64, int32, int16, int8, uint8, found torch.float32",
         {"positive": torch.ones(3)}),
        ("positive must be a tensor of int64", {"positive": torch.ones(3, dtype=torch.bool)}),
        ("positive must have shape [3], found [2]", {"positive": torch.zeros(2, dtype=torch.int64)}),
        ("positive must index the 5 passages, found 5", {"positive": torch.tensor([0, 5, 2])}),
        ("positive must index the 5 passages, found -1", {"positive": torch.tensor([0, -1, 2])}),
        ("positive is on meta", {"positive": torch.zeros(3, dtype=torch.int64, device="meta")}),
        ("passage_ids must have shape [5], found [3]", {"passage_ids": torch.arange(3)}),
        ("passage_ids must be a tensor of int64", {"passage_ids": torch.rand(5)}),
        ("passage_ids must be a tensor of int64", {"passage_ids": torch.ones(5, dtype=torch.uint64)}),
        ("passage_ids is on meta", {"passage_ids": torch.arange(5, device="meta")}),
        ("query_ids must have shape [3], found [5]", {"query_ids": torch.arange(5), "passage_ids": torch.arange(5)}),
        ("query_ids needs passage_ids", {"query_ids": torch.arange(3)}),
        ("group must be a torch.distributed process group", {"group": object()}),
        ("precision must be one of auto, fp32, tf32, bf16", {"precision": "fp8"}),
        ("precision 'bf16' does not apply to float64", {"query": QUERY.double(), "passage": PASSAGE.double(),
                                                         "precision": "bf16"}),
        ("implementation must be one of auto, full, dense, chunked, triton", {"implementation": "tiled"}),
        ("exchange must be one of auto, ring, gather, found 'pigeon'", {"exchange": "pigeon"}),
        ("symmetric must be True or False, found None", {"symmetric": None}),
        ("workspace_mib must be a positive number of MiB, found 0", {"workspace_mib": 0}),
        ("workspace_mib must be a positive number of MiB, found '256'", {"workspace_mib": "256"}),
        ("workspace_mib must be a positive number of MiB, found 1e+308", {"workspace_mib": 1e308}),
        ("workspace_mib must be a positive number of MiB, found nan", {"workspace_mib": math.nan}),
    ],
)  # fmt: skip
def test_invalid_arguments_are_named(named: str, changed: dict[str, Any]) -> None:
    arguments = {"query": QUERY, "passage": PASSAGE, "logit_scale": 10.0} | changed
    with pytest.raises(ValueError, match="^" + re.escape(named)) as refused:
        inf_cl_loss(arguments.pop("query"), arguments.pop("passage"), **arguments)
    assert "\n" not in str(refused.value)


def test_precision_auto_follows_dtype_and_autocast() -> None:
    assert resolve_precision("auto", torch.ones(1, 1)) == "fp32"
    assert resolve_precision("auto", torch.ones(1, 1, dtype=torch.bfloat16)) == "bf16"
    assert resolve_precision("auto", torch.ones(1, 1, dtype=torch.float16)) == "tf32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert resolve_precision("auto", torch.ones(1, 1)) == "bf16"
        assert resolve_precision("fp32", torch.ones(1, 1)) == "fp32"


@pytest.mark.parametrize("implementation", ["full", "chunked"])
def test_bf16_rounds_the_operands_and_nothing_else(implementation: Any) -> None:
    """The loss of the rounded embeddings to float32 accuracy, also under autocast, which would round the scores."""
    torch.manual_seed(0)
    query, passage = (normalize(torch.randn(rows, 16), dim=1).requires_grad_() for rows in (33, 47))
    rounded = [side.detach().bfloat16().double().requires_grad_() for side in (query, passage)]
    truth = inf_cl_loss(*rounded, logit_scale=50.0, symmetric=True, implementation="full")
    expected = torch.autograd.grad(truth, rounded)
    options: dict[str, Any] = {"logit_scale": 50.0, "symmetric": True, "implementation": implementation}
    asked = inf_cl_loss(query, passage, precision="bf16", workspace_mib=2**-7, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        followed = inf_cl_loss(query, passage, workspace_mib=2**-7, **options)
    found = torch.autograd.grad(followed, (query, passage))
    assert asked.item() == followed.item() == pytest.approx(truth.item(), abs=2e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=1e-5)


def test_autocast_does_not_change_fp32_tiles() -> None:
    torch.manual_seed(0)
    query, passage = (normalize(torch.randn(rows, 16), dim=1).requires_grad_() for rows in (33, 47))
    outside = inf_cl_loss(query, passage, logit_scale=50.0)
    expected = torch.autograd.grad(outside, (query, passage))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = inf_cl_loss(query, passage, logit_scale=50.0, precision="fp32")
        found = torch.autograd.grad(inside, (query, passage))
    assert inside.item() == outside.item()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("around", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_autocast_around_embeddings_of_another_precision(dtype: torch.dtype, around: torch.dtype) -> None:
    torch.manual_seed(0)
    query, passage = (normalize(torch.randn(rows, 16), dim=1).to(dtype).requires_grad_() for rows in (33, 47))
    outside = inf_cl_loss(query, passage, logit_scale=50.0)
    expected = torch.autograd.grad(outside, (query, passage))
    with torch.autocast("cpu", dtype=around):
        inside = inf_cl_loss(query, passage, logit_scale=50.0)
        found = torch.autograd.grad(inside, (query, passage))
    assert inside.item() == outside.item()
    assert all(map(torch.equal, found, expected))


def test_clip_loss_is_the_symmetric_infonce() -> None:
    torch.manual_seed(0)
    query, passage = (normalize(torch.randn(19, 8, dtype=torch.float64), dim=1) for _ in range(2))
    expected = inf_cl_loss(query, passage, logit_scale=14.0, symmetric=True)
    torch.testing.assert_close(clip_loss(query, passage, logit_scale=14.0), expected)
    with pytest.raises(ValueError, match=r"^passage has 19 rows, query has 18"):
        clip_loss(query[:18], passage, logit_scale=14.0)
    with pytest.raises(ValueError, match=r"^passage has 18 rows, query has 19"):
        clip_loss(query, passage[:18], logit_scale=14.0)
    with pytest.raises(ValueError, match=r"^logit_scale must be finite"):
        clip_loss(query, passage, logit_scale=math.inf)


def test_module_equals_the_function_and_learns_its_scale() -> None:
    torch.manual_seed(0)
    query, passage = (normalize(torch.randn(9, 8), dim=1) for _ in range(2))
    module = InfCLLoss(logit_scale=14.0, symmetric=True)
    scale = torch.tensor(14.0, requires_grad=True)
    expected = inf_cl_loss(query, passage, logit_scale=scale, symmetric=True)
    expected.backward()
    loss = module(query, passage)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # d/d log s = s · d/ds
    assert float(module.log_logit_scale.grad) == pytest.approx(14.0 * float(scale.grad), rel=1e-5)
    assert list(module.state_dict()) == ["log_logit_scale"]
    assert not InfCLLoss(learnable=False).log_logit_scale.requires_grad
    wide = module.double()
    assert wide(query.double(), passage.double()).item() == pytest.approx(
        inf_cl_loss(query.double(), passage.double(), logit_scale=wide.log_logit_scale.exp(), symmetric=True).item(),
        rel=1e-14,
    )


@pytest.mark.parametrize("module_class", [InfCLLoss, SigmoidLoss])
def test_module_passes_its_settings_on(module_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"precision": "tf32", "implementation": "triton", "workspace_mib": 7, "group": None}
    settings |= {"exchange": "gather", "symmetric": True} if module_class is InfCLLoss else {}
    seen: dict[str, Any] = {}
    name = "inf_cl_loss" if module_class is InfCLLoss else "sigmoid_loss"
    monkeypatch.setattr(sys.modules[module_class.__module__], name, lambda query, passage, **given: seen.update(given))
    ids = {"positive": torch.arange(3), "query_ids": torch.arange(3), "passage_ids": torch.arange(5)}
    module_class(**settings)(QUERY, PASSAGE, **ids)
    assert {given: seen[given] for given in settings} == settings
    assert all(seen[given] is value for given, value in ids.items())


WRONG: list[dict[str, Any]] = [
    {"precision": "x"},
    {"implementation": "x"},
    {"workspace_mib": 0},
    {"max_logit_scale": 0},
    {"max_logit_scale": math.inf},
    {"logit_scale": 101.0},
    {"logit_scale": "x"},
    {"logit_scale": True},
]


@pytest.mark.parametrize(
    ("module_class", "wrong"),
    [
        *((module_class, wrong) for module_class in (InfCLLoss, SigmoidLoss) for wrong in WRONG),
        (InfCLLoss, {"symmetric": "no"}),
        (InfCLLoss, {"exchange": "x"}),
        (SigmoidLoss, {"logit_bias": 1e39}),
        (SigmoidLoss, {"logit_bias": "x"}),
    ],
)
def test_module_refuses_invalid_arguments(module_class: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
        module_class(**wrong)


def test_a_clamped_scale_can_leave_the_clamp() -> None:
    module = InfCLLoss(logit_scale=49.0, max_logit_scale=50.0)
    step = torch.optim.SGD(module.parameters(), lr=1.0)
    matched = torch.eye(2)
    mismatched = matched.flip(0)
    with torch.no_grad():
        module.log_logit_scale.fill_(math.log(80.0))
    assert float(module.logit_scale.detach()) == pytest.approx(50.0)
    # The passages match their queries almost: a larger scale would lower the loss, so its gradient is dropped.
    passage = torch.nn.functional.normalize(torch.tensor([[1.0, 0.97], [0.97, 1.0]]), dim=1)
    module(matched, passage).backward()
    assert float(module.log_logit_scale.grad) == 0
    module.zero_grad()
    module(matched, mismatched).backward()
    assert float(module.log_logit_scale.grad) > 0
    step.step()
    assert float(module.logit_scale.detach()) < 50.0


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("max_logit_scale", {"max_logit_scale": 0.0}),
        ("max_logit_scale", {"max_logit_scale": math.inf}),
        ("logit_scale", {"logit_scale": 0.0}),
        ("logit_scale", {"logit_scale": 101.0}),
        ("logit_scale", {"logit_scale": math.nan}),
    ],
)
def test_module_names_invalid_scales(named: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{named} must be"):
        InfCLLoss(**options)
