"""Argument errors of sigmoid_loss and SigmoidLoss; initialization and training of the module."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from losses import SigmoidLoss, sigmoid_loss
from losses.triton import launch

QUERY, PASSAGE = torch.ones(3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("query must be a tensor", {"query": [[1.0]]}),
        ("passage has 6 dimensions, query has 4", {"passage": torch.ones(5, 6)}),
        ("logit_scale must be finite in float32, found nan", {"logit_scale": math.nan}),
        ("logit_bias must be finite in float32, found -inf", {"logit_bias": -math.inf}),
        ("logit_bias must be finite in float32, found nan", {"logit_bias": torch.tensor(math.nan)}),
        ("logit_bias must be a number", {"logit_bias": "-10"}),
        ("logit_bias must be a number", {"logit_bias": False}),
        ("logit_bias must be a number", {"logit_bias": torch.ones(1)}),
        ("logit_bias must be a number", {"logit_bias": torch.tensor(3)}),
        ("logit_bias is on meta", {"logit_bias": torch.ones((), device="meta")}),
        ("positive must index the 5 passages, found 5", {"positive": torch.tensor([0, 5, 2])}),
        ("passage_ids must have shape [5], found [3]", {"passage_ids": torch.arange(3)}),
        ("group must be a torch.distributed process group or None", {"group": object()}),
        ("precision must be one of auto, fp32, tf32, bf16", {"precision": "fp8"}),
        ("implementation must be one of auto, full, chunked, triton", {"implementation": "fastest"}),
        ("workspace_mib must be a positive number of MiB, found 0", {"workspace_mib": 0}),
    ],
)
def test_invalid_arguments_are_named(named: str, changed: dict[str, Any]) -> None:
    arguments = {"query": QUERY, "passage": PASSAGE, "logit_scale": 10.0, "logit_bias": -10.0} | changed
    with pytest.raises(ValueError, match="^" + re.escape(named)) as refused:
        sigmoid_loss(arguments.pop("query"), arguments.pop("passage"), **arguments)
    assert "\n" not in str(refused.value)


def test_module_is_initialized_as_siglip_and_learns_scale_and_bias() -> None:
    torch.manual_seed(0)
    query, passage = (normalize(torch.randn(9, 8), dim=1) for _ in range(2))
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


def test_a_clamped_scale_can_leave_the_clamp() -> None:
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


def test_triton_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    launch.warn_fallback.cache_clear()
    options: dict[str, Any] = {"logit_scale": 10.0, "logit_bias": -10.0}
    with pytest.warns(UserWarning, match="'triton' falls back to 'chunked': the embeddings are on cpu"):
        loss = sigmoid_loss(QUERY, PASSAGE, implementation="triton", **options)
    assert loss.item() == sigmoid_loss(QUERY, PASSAGE, implementation="chunked", **options).item()
