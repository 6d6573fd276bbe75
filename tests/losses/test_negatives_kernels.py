"""Kernels for own, frozen and same-side negatives. Without a GPU they run under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from negatives_batch import SOURCES, Batch, relative_errors, step
from torch import Tensor

from losses import Negatives, Ragged, inf_cl_loss
from losses.negatives import same_side
from losses.triton.launch import interpreted

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU instead")
DEVICES = [pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
MIB = 2**20


def random_batch(device: str, masks: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Batch:
    """Small for the interpreter, several tiles and blocks for a GPU; values that `dtype` represents."""
    queries, passages, dims, frozen = (37, 45, 9, 41) if device == "cpu" else (901, 1103, 200, 5003)
    batch = Batch.random(queries, passages, dims, frozen, masks=masks, random_positive=False, own=9, **options)
    return batch.rounded(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logit_scale", [20.0, 500.0])  # one shift, running maxima
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_equal_the_full_matrix(source: str, logit_scale: float, device: str) -> None:
    for symmetric in (False, True):
        batch = random_batch(device, masks=symmetric)
        options: dict[str, Any] = {"symmetric": symmetric, "workspace_mib": 0.01 if device == "cpu" else 4}
        truth = step(batch, (source,), logit_scale, **options, implementation="full")
        found = step(batch, (source,), logit_scale, torch.float32, device, **options, implementation="triton")
        # float32 rounds scores of 500 to 3e-5.
        assert max(relative_errors(found, truth)) <= (1e-5 if logit_scale == 20 else 2e-4), symmetric


@pytest.mark.parametrize("device", DEVICES)
def test_all_sources_together_with_positives_by_index(device: str) -> None:
    for queries, passages in ((19, 27), (1, 5), (1, 1)):
        batch = Batch.random(queries, passages, 9, 23, masks=True, random_positive=True, seed=3)
        options: dict[str, Any] = {"symmetric": True, "workspace_mib": 0.01}
        truth = step(batch, SOURCES, 20.0, **options, implementation="full")
        found = step(batch, SOURCES, 20.0, torch.float32, device, **options, implementation="triton")
        assert max(relative_errors(found, truth, floor=0.2 if queries == 1 else 1e-6)) <= 1e-5


@needs_interpreter
@pytest.mark.parametrize("logit_scale", [20.0, 500.0])  # one shift, running maxima
def test_strips_cover_each_pair_of_a_side_once(logit_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_side, "CUBLAS_TILE_ROWS", 8)
    for masks in (False, True):
        batch = Batch.random(37, 45, 9, masks=masks, random_positive=masks)
        truth = step(batch, ("same_side",), logit_scale, symmetric=True, implementation="full")
        found = step(batch, ("same_side",), logit_scale, torch.float32, symmetric=True, implementation="triton")
        assert max(relative_errors(found, truth)) <= (1e-5 if logit_scale == 20 else 2e-4), masks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_within_their_rounding(dtype: torch.dtype, device: str) -> None:
    batch = random_batch(device, False, dtype)
    for sources in (*((source,) for source in SOURCES), SOURCES):
        truth = step(batch, sources, 20.0, symmetric=True, implementation="full", upstream=32.0)
        found = step(batch, sources, 20.0, dtype, device, symmetric=True, implementation="triton", upstream=32.0)
        loss, *gradients = relative_errors(found, truth)
        # The interpreter stores bf16 by truncation, and its own gradients underflow less.
        allowed = 4e-3 if dtype == torch.bfloat16 and device == "cuda" else 8e-3 if dtype == torch.bfloat16 else 2e-3
        assert loss <= 1e-3 and max(gradients) <= allowed, (sources, loss, gradients)


@pytest.mark.parametrize("device", DEVICES)
def test_longer_frozen_passages_in_a_later_block_change_to_running_maxima(device: str) -> None:
    batch = Batch.random(21, 21, 8, 5000 if device == "cuda" else 75, masks=False, random_positive=False)
    frozen = batch.frozen.clone()
    frozen[len(frozen) // 2 :] *= 30
    pairs = torch.stack([torch.zeros(len(frozen) // 2), torch.arange(len(frozen) // 2)], 1).long()
    # Query 0 has no frozen negative in the first blocks.
    batch = replace(batch, frozen=frozen, frozen_excluded=pairs, excluded=torch.tensor([[0, 1]]))
    truth = step(batch, ("frozen",), 20.0, implementation="full")
    found = step(batch, ("frozen",), 20.0, torch.float32, device, implementation="triton", workspace_mib=0.001)
    assert max(relative_errors(found, truth)) <= 2e-4


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_deterministic(device: str) -> None:
    batch = random_batch(device, masks=True)
    options: dict[str, Any] = {"symmetric": True, "implementation": "triton", "workspace_mib": 0.05}
    first = step(batch, SOURCES, 20.0, torch.float32, device, **options)
    again = step(batch, SOURCES, 20.0, torch.float32, device, **options)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", ["own", "frozen"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_gives_a_loss_that_is_not(bad: float, source: str, device: str) -> None:
    batch = Batch.random(9, 9, 8, masks=False, random_positive=False)
    getattr(batch, source)[1, 2] = bad
    assert not step(batch, (source,), 20.0, torch.float32, device, implementation="triton")[0].isfinite()


@needs_interpreter
def test_no_uninitialized_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Tensor:
            made = original(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return call

    batch = Batch.random(21, 25, 9, 30, masks=True, random_positive=False)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    for logit_scale in (10.0, 1e3):
        found = step(
            batch, SOURCES, logit_scale, torch.float32, symmetric=True, implementation="triton", workspace_mib=0.01
        )
        assert all(each.isfinite().all() for each in found)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [64, 384, 768, 1152])
@pytest.mark.parametrize("source", SOURCES)
def test_bfloat16_errors_on_the_gpu(source: str, dims: int) -> None:
    batch = Batch.random(3001, 3100, dims, 20_011, masks=False, random_positive=False, own=9).rounded(torch.bfloat16)
    truth = step(batch, (source,), 50.0, device="cuda", symmetric=True, implementation="full")
    for workspace_mib in (8, 256):
        options: dict[str, Any] = {"symmetric": True, "implementation": "triton", "workspace_mib": workspace_mib}
        loss, query, passage, _, *own = relative_errors(
            step(batch, (source,), 50.0, torch.bfloat16, "cuda", **options), truth
        )
        assert loss <= 1e-4 and max(query, passage, *own) <= 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize("pinned", [False, True])
def test_frozen_passages_on_the_host_equal_those_on_the_device(pinned: bool, implementation: str) -> None:
    batch = Batch.random(901, 901, 200, 30_011, masks=True, random_positive=False).rounded(torch.bfloat16)
    options: dict[str, Any] = {"implementation": implementation, "workspace_mib": 4}
    expected = step(batch, ("frozen",), 20.0, torch.bfloat16, "cuda", **options)
    host = batch.frozen.bfloat16()
    found = step(
        batch, ("frozen",), 20.0, torch.bfloat16, "cuda", frozen=host.pin_memory() if pinned else host, **options
    )
    assert max(relative_errors(found, expected)) <= 1e-3


@pytest.mark.gpu
def test_a_step_does_not_synchronize() -> None:
    batch = random_batch("cuda", masks=True)
    given = {name: getattr(batch, name).float().cuda() for name in ("query", "passage", "own", "frozen")}
    offsets, pairs, ids = (each.cuda() for each in (batch.offsets, batch.frozen_excluded, batch.passage_ids))
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    for frozen in (given["frozen"], given["frozen"].cpu().pin_memory()):
        for _ in range(2):
            query, passage, own = (given[name].requires_grad_() for name in ("query", "passage", "own"))
            negatives = Negatives(own=Ragged(own, offsets), frozen=frozen, frozen_excluded=pairs, same_side=True)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss = inf_cl_loss(
                    query, passage, logit_scale=scale, symmetric=True, passage_ids=ids, negatives=negatives
                )
                torch.autograd.grad(loss, (query, passage, own, scale))
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "chunked", "full"])
def test_invalid_values_on_the_gpu_give_nan(implementation: Any) -> None:
    batch = Batch.random(5, 5, 8, masks=False, random_positive=False)
    query, passage, own, frozen = (
        each.float().cuda() for each in (batch.query, batch.passage, batch.own, batch.frozen)
    )
    offsets = batch.offsets.cuda()
    for negatives in (
        Negatives(own=Ragged(own, offsets + 1)),
        Negatives(own=Ragged(own, torch.cat([offsets[:1], offsets[1:].flip(0)]))),
        Negatives(own=Ragged(own, offsets * 1000)),
        Negatives(frozen=frozen, frozen_excluded=torch.tensor([[0, 41]], device="cuda")),
        Negatives(frozen=frozen, frozen_excluded=torch.tensor([[5, 0]], device="cuda")),
    ):
        loss = inf_cl_loss(query, passage, logit_scale=5.0, negatives=negatives, implementation=implementation)
        assert loss.isnan()


@pytest.mark.gpu
def test_memory_on_the_gpu_is_linear() -> None:
    rows, dims = 32_768, 256
    query, passage, own = (
        torch.nn.functional.normalize(torch.randn(count, dims, device="cuda"), dim=1).bfloat16().requires_grad_()
        for count in (rows, rows, 4 * rows)
    )
    frozen = torch.randn(4 * rows, dims, device="cuda").bfloat16() / dims**0.5
    negatives = Negatives(
        own=Ragged(own, torch.arange(rows + 1, device="cuda") * 4), frozen=frozen.cpu().pin_memory(), same_side=True
    )

    def peak() -> float:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = inf_cl_loss(query, passage, logit_scale=20.0, symmetric=True, negatives=negatives, workspace_mib=64)
        torch.autograd.grad(loss, (query, passage, own))
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    peak()
    # Gradients in bf16; float32 sums of both sides and of the means of frozen passages; the workspace. One score
    # matrix in bf16 is 2,048 MiB.
    side_mib = rows * dims * 4 / MIB
    assert peak() <= 10 * side_mib + 64 + 32


@pytest.mark.gpu
def test_more_frozen_elements_than_32_bits_count() -> None:
    rows, dims = 6_000_000, 512
    frozen = torch.zeros(rows, dims, dtype=torch.bfloat16, device="cuda")
    batch = Batch.random(8, 8, dims, 8, masks=False, random_positive=False).rounded(torch.bfloat16)
    frozen[-8:] = batch.frozen.cuda()
    found = step(batch, ("frozen",), 20.0, torch.bfloat16, "cuda", frozen=frozen, implementation="triton")
    scores = 20 * batch.query @ batch.passage.T
    total = scores.exp().sum(1) + (20 * batch.query @ batch.frozen.T).exp().sum(1) + rows - 8
    expected = (total.log() - scores.diagonal()).mean()
    assert float(found[0]) == pytest.approx(float(expected), rel=1e-5)
