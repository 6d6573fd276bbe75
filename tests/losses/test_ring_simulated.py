"""A ring of eight ranks, one thread each: loss and gradients of the whole batch, and the bytes that ring.py counts."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from simulated import MirroredCommunication, SimulatedCommunication, on_simulated_ranks
from torch import Tensor
from torch.nn.functional import normalize

from losses import inf_cl_loss, sigmoid_loss
from losses.triton.launch import interpreted

RANKS, ROWS, DIMENSIONS = 8, 6, 5
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU instead")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def bytes_of_the_ring(element: int, symmetric: bool, ids: bool) -> int:
    """The formula in the docstring of losses/distributed/ring.py; tiles in PyTorch do not pad the width."""
    block = DIMENSIONS * element + 8 * ids
    accumulator = max(4, element)
    forward = (RANKS - 1) * ROWS * (block + 4 * accumulator * symmetric)
    gradients = (RANKS - 1) * ROWS * (DIMENSIONS * accumulator + 2 * accumulator * symmetric)
    return forward + (RANKS - 2) * ROWS * block + gradients


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eight_ranks_equal_one_process_and_send_the_documented_bytes(
    dtype: torch.dtype, ids: bool, symmetric: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(RANKS * ROWS, DIMENSIONS, dtype=dtype, generator=generator) for _ in range(2))
    query, passage = (normalize(side, dim=1) for side in sides)
    passage_ids = torch.arange(RANKS * ROWS) % 17 if ids else None
    accumulated = torch.promote_types(dtype, torch.float32)

    def one_rank(communication: SimulatedCommunication) -> tuple[list[Tensor], int]:
        leaves = [side.split(ROWS)[communication.rank].clone().requires_grad_() for side in (query, passage)]
        scale = torch.tensor(20.0, dtype=accumulated, requires_grad=True)
        own_ids = None if passage_ids is None else passage_ids.split(ROWS)[communication.rank]
        loss = inf_cl_loss(
            *leaves, logit_scale=scale, passage_ids=own_ids, symmetric=symmetric, group=communication, exchange="ring"
        )
        gradients = torch.autograd.grad(loss, [*leaves, scale])
        return [loss.detach(), *(gradient / RANKS for gradient in gradients)], sum(communication.sent)

    results = on_simulated_ranks(RANKS, one_rank)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert {sent for _, sent in results} == {bytes_of_the_ring(query.element_size(), symmetric, ids)}

    leaves = [side.double().requires_grad_() for side in (query, passage)]
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    truth = inf_cl_loss(*leaves, logit_scale=scale, passage_ids=passage_ids, symmetric=symmetric, implementation="full")
    expected = [truth.detach(), *torch.autograd.grad(truth, [*leaves, scale])]
    values = [values for values, _ in results]
    found = [
        values[0][0], torch.cat([value[1] for value in values]), torch.cat([value[2] for value in values]),
        torch.stack([value[3] for value in values]).sum(0),
    ]  # fmt: skip
    allowed = 1e-12 if dtype == torch.float64 else 5e-6
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= allowed * theirs.norm()


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("ids", [False, True])
def test_the_sigmoid_loss_sends_the_documented_bytes(ids: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(size * ROWS, DIMENSIONS, generator=generator) for _ in range(2))
    query, passage = (normalize(side, dim=1) for side in sides)
    positive = torch.randperm(size * ROWS, generator=generator)
    passage_ids = torch.arange(size * ROWS) % 17 if ids else None
    numbers = (torch.tensor(10.0), torch.tensor(-3.0))

    def one_rank(communication: SimulatedCommunication) -> tuple[list[Tensor], int]:
        leaves = [side.split(ROWS)[communication.rank].clone().requires_grad_() for side in (query, passage)]
        leaves += [number.clone().requires_grad_() for number in numbers]
        own_ids = None if passage_ids is None else passage_ids.split(ROWS)[communication.rank]
        loss = sigmoid_loss(
            *leaves[:2], logit_scale=leaves[2], logit_bias=leaves[3], positive=positive.split(ROWS)[communication.rank],
            passage_ids=own_ids, group=communication,
        )  # fmt: skip
        gradients = torch.autograd.grad(loss, leaves)
        return [loss.detach(), *(gradient / size for gradient in gradients)], sum(communication.sent)

    results = on_simulated_ranks(size, one_rank)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert {sent for _, sent in results} == {(size - 1) * ROWS * (DIMENSIONS * 4 + 8 * ids + DIMENSIONS * 4)}

    leaves = [each.double().requires_grad_() for each in (query, passage, *numbers)]
    truth = sigmoid_loss(
        *leaves[:2], logit_scale=leaves[2], logit_bias=leaves[3], positive=positive, passage_ids=passage_ids,
        implementation="full",
    )  # fmt: skip
    values = [values for values, _ in results]
    found = [values[0][0], *(torch.cat([value[place] for value in values]) for place in (1, 2))]
    found += [torch.stack([value[place] for value in values]).sum(0) for place in (3, 4)]
    for ours, theirs in zip(found, [truth.detach(), *torch.autograd.grad(truth, leaves)], strict=True):
        assert (ours.double() - theirs).norm() <= 5e-6 * theirs.norm()


def test_embeddings_are_freed_if_operands_are_half_precision_copies() -> None:
    leaf = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def one_rank(communication: SimulatedCommunication) -> tuple[bool, Tensor]:
        query, passage = leaf.clone(), leaf.flip(0)
        references = [weakref.ref(side) for side in (query, passage)]
        loss = inf_cl_loss(
            query,
            passage,
            logit_scale=0.5,
            group=communication,
            exchange="ring",
            implementation="triton",
            precision="bf16",
        )
        del query, passage
        gc.collect()
        freed = all(reference() is None for reference in references)
        return freed, torch.autograd.grad(loss, leaf)[0]

    ((freed, gradient),) = on_simulated_ranks(1, one_rank)
    assert freed
    wide = leaf.detach().double().requires_grad_()
    truth = inf_cl_loss(wide, wide.flip(0), logit_scale=0.5, implementation="full")
    expected = torch.autograd.grad(truth, wide)[0]
    assert (gradient - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("logit_scale", [20.0, 500.0])  # one shift, running maxima
def test_kernels_of_mirrored_ranks_give_the_loss_of_the_doubled_batch(
    logit_scale: float, symmetric: bool, exchange: Any, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, passage = (torch.randn(rows, 24, generator=generator, dtype=torch.float64) for rows in (131, 143))
    passage[:131] += 0.3 * query
    shard = [normalize(side, dim=1).to(device) for side in (query, passage)]
    scale = torch.tensor(logit_scale, device=device)
    leaves = [each.float().requires_grad_() for each in (*shard, scale)]
    loss = inf_cl_loss(
        *leaves[:2], logit_scale=leaves[2], symmetric=symmetric, group=MirroredCommunication(), exchange=exchange,
        implementation="triton", precision="fp32",
    )  # fmt: skip
    found = [loss.detach(), *torch.autograd.grad(loss, leaves)]

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    positive = torch.cat([torch.arange(131), 143 + torch.arange(131)]).to(device)
    truth = inf_cl_loss(
        *(torch.cat([side] * 2) for side in wide[:2]), logit_scale=wide[2], positive=positive, symmetric=symmetric,
        implementation="full",
    )  # fmt: skip
    # W = 2 times a rank's contribution, averaged over two equal ranks, is the gradient of rows that are in the batch
    # twice.
    for ours, theirs in zip(found, [truth.detach(), *torch.autograd.grad(truth, wide)], strict=True):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()
