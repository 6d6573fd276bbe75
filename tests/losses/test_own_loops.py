"""Loss modules in users' training loops: copied, averaged, pickled, compiled, and with FSDP, DDP and EMA."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import LoadedPython, torchrun
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel

from losses import InfCLLoss, SigmoidLoss, inf_cl_loss
from losses.inputs import CheckedOptions, ContrastiveBatch
from losses.masked.compiled import negatives_loss_op
from losses.options import NegativeLimit
from losses.torch_tiles.compiled import compiled_tiled_loss, tiled_loss_op

QUERY, PASSAGE = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
LOSSES = (InfCLLoss, SigmoidLoss)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield {"default": distributed.group.WORLD, "another": distributed.new_group([0])}
    distributed.destroy_process_group()


def saved_and_loaded(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", ["default", "another"])
def test_copies_share_the_group(groups: dict[str, Any], kind: Any, name: str) -> None:
    loss = kind(group=groups[name])
    expected = loss(QUERY, PASSAGE)
    for copied in (copy.copy(loss), copy.deepcopy(loss), copy.deepcopy(nn.ModuleList([loss]))[0]):
        assert copied.group is groups[name] and torch.equal(copied(QUERY, PASSAGE), expected)
    average = AveragedModel(loss, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(loss)
    with torch.no_grad():
        loss.log_logit_scale += 1
    average.update_parameters(loss)
    assert average.module.log_logit_scale.item() == pytest.approx(loss.log_logit_scale.item() - 0.5)
    assert average(QUERY, PASSAGE).isfinite() and average.module.group is groups[name]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_pickled_loss_restores_the_default_group_and_asks_for_another(groups: dict[str, Any], kind: Any) -> None:
    loss = kind(group=groups["default"], logit_scale=3.0)
    assert torch.equal(saved_and_loaded(loss)(QUERY, PASSAGE), loss(QUERY, PASSAGE))
    assert saved_and_loaded(loss).group is groups["default"]
    loss.group = groups["another"]
    # Saved and loaded twice: a module without its group can be saved again.
    loaded = saved_and_loaded(saved_and_loaded(loss))
    with pytest.raises(ValueError, match="group must be set again"):
        loaded(QUERY, PASSAGE)
    loaded.group = groups["another"]
    assert torch.equal(loaded(QUERY, PASSAGE), loss(QUERY, PASSAGE))
    assert saved_and_loaded(kind()).group is None


def test_a_pickled_group_of_another_size_is_not_restored(
    groups: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = InfCLLoss(group=groups["default"])
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    for name, value in (("is_initialized", False), ("get_world_size", 2)):
        with monkeypatch.context() as changed:
            changed.setattr(distributed, name, lambda *_, value=value: value)
            buffer.seek(0)
            loaded = torch.load(buffer, weights_only=False)
        with pytest.raises(ValueError, match="process group of 1 processes"):
            loaded(QUERY, PASSAGE)


def values(loss: Any, query: Tensor, passage: Tensor, parameters: Any, **arguments: Any) -> list[Tensor]:
    leaves = [query.clone().requires_grad_(), passage.clone().requires_grad_(), *parameters]
    value = loss(*leaves[:2], **arguments)
    return [value.detach(), *torch.autograd.grad(3 * value, leaves)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (InfCLLoss, {"implementation": "chunked"}),
        (InfCLLoss, {"implementation": "auto", "symmetric": True}),
        (InfCLLoss, {"implementation": "full", "symmetric": True}),
        (SigmoidLoss, {"implementation": "auto"}),
        (SigmoidLoss, {"implementation": "full"}),
    ],
)
def test_compiled_on_a_cpu_equals_eager(kind: Any, options: dict[str, Any]) -> None:
    loss = kind(**options, logit_scale=5.0, workspace_mib=0.001)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 8])
    cases: list[Any] = [
        (7, 9, torch.float32, {"positive": torch.tensor([8, 1, 2, 3, 4, 5, 6]), "passage_ids": ids}),
        # From the second size on, the compiler treats sizes as symbols.
        (61, 83, torch.bfloat16, {}),
        (67, 71, torch.bfloat16, {}),
    ]
    # The whole matrix is compiled operation by operation, which takes seconds per size.
    for queries, passages, dtype, arguments in cases[:1] if options["implementation"] == "full" else cases:
        query, passage = (torch.randn(rows, 5).to(dtype) for rows in (queries, passages))
        expected = values(loss, query, passage, loss.parameters(), **arguments)
        found = values(compiled, query, passage, loss.parameters(), **arguments)
        for ours, eager in zip(found, expected, strict=True):
            assert ours.dtype == eager.dtype and ours.shape == eager.shape
            torch.testing.assert_close(ours, eager, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    if options["implementation"] != "full":
        with torch.no_grad():
            torch.testing.assert_close(compiled(QUERY, PASSAGE), loss(QUERY, PASSAGE))


def test_compiled_tiles_do_not_underflow_float16_gradients() -> None:
    query, passage = (side.half() for side in (QUERY, PASSAGE))
    loss = InfCLLoss(logit_scale=1.0)
    torch.compiler.reset()
    compiled = torch.compile(lambda *sides: 1e-6 * loss(*sides), backend="aot_eager", fullgraph=True)

    def lifted(of: Any) -> Tensor:
        leaf = query.clone().requires_grad_()
        return torch.autograd.grad(1e6 * of(leaf, passage), leaf)[0]

    torch.testing.assert_close(lifted(compiled), lifted(lambda *sides: 1e-6 * loss(*sides)), rtol=1e-2, atol=1e-4)


def test_values_are_checked_in_a_compiled_graph() -> None:
    torch.compiler.reset()

    def loss(scale: Tensor, positive: Tensor) -> Tensor:
        return inf_cl_loss(QUERY, PASSAGE, logit_scale=scale, positive=positive, implementation="chunked")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="positive must index the 7 passages, found 7"):
        compiled(torch.tensor(2.0), torch.arange(1, 8))
    with pytest.raises(ValueError, match="logit_scale must be finite"):
        compiled(torch.tensor(torch.inf), torch.arange(7))


def test_the_operators_take_every_field_of_a_batch() -> None:
    # A field that an operator does not take would be ignored by compiled losses.
    of_batch, of_options, of_limit = (
        {field.name for field in dataclasses.fields(kind)} for kind in (ContrastiveBatch, CheckedOptions, NegativeLimit)
    )
    outside = {"further", "single_partition"}
    for operator, wanted in (
        (tiled_loss_op, of_batch - {"options"} - outside),
        (negatives_loss_op, of_batch - {"options"} - outside | of_options - {"limit"} | of_limit),
    ):
        assert wanted <= {argument.name for argument in operator._opoverload._schema.arguments}
    batch = ContrastiveBatch(QUERY, PASSAGE, torch.tensor(2.0), None, None, None, False, further=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="negatives outside the pool"):
        compiled_tiled_loss(batch, "fp32", 2**20)


def test_with_fsdp_ddp_and_averaged_weights() -> None:
    with LoadedPython("losses", "torch.distributed.run", "torch.distributed.fsdp") as python:
        done = python.run(*torchrun(2, Path(__file__).with_name("loops_on_ranks.py")))
    assert done.returncode == 0, done.stderr[-4000:]
