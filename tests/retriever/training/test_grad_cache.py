"""The gradient cache gives the gradients of one backward, including dropout."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from losses import InfCLLoss
from retriever.training import grad_cache

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.4), nn.Linear(16, 5)).double().train()


def gradients(keep: int | None, sizes: Sequence[int], on_host: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    tower, loss = network(), InfCLLoss(logit_scale=7.0, symmetric=True, implementation="full").double()
    inputs = torch.randn(24, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss_of(embeddings: Sequence[Tensor]) -> Tensor:
        both = nn.functional.normalize(torch.cat(list(embeddings)), dim=1)
        return loss(both[:10], both[10:])

    torch.manual_seed(3)
    micro_batches = inputs.split(list(sizes))
    if keep is None:
        value = loss_of([tower(micro_batch) for micro_batch in micro_batches])
        value.backward()
    else:
        value = grad_cache.backward(tower, micro_batches, loss_of, CPU, keep=keep, on_host=on_host)
    named = [*tower.named_parameters(), *loss.named_parameters()]
    return value.detach(), {name: parameter.grad for name, parameter in named}


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("sizes", [[24], [1, 23], [7, 7, 7, 3], [1] * 24])
def test_cached_gradients_equal_direct_gradients_with_dropout(sizes: list[int], keep: int, on_host: bool) -> None:
    value, cached = gradients(keep, sizes, on_host)
    expected, direct = gradients(None, sizes)
    assert torch.equal(value, expected)
    assert set(cached) == set(direct) and "log_logit_scale" in cached
    for name in direct:
        torch.testing.assert_close(cached[name], direct[name], rtol=1e-12, atol=1e-14)


def test_the_number_of_kept_graphs_does_not_change_the_result() -> None:
    # A resumed run may have less memory for graphs.
    without_graphs = gradients(0, [5] * 4 + [4])[1]
    for keep in (1, 2, 5):
        cached = gradients(keep, [5] * 4 + [4])[1]
        assert all(torch.equal(cached[name], without_graphs[name]) for name in without_graphs)


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_embeddings_without_gradients_are_supported(keep: int) -> None:
    tower = nn.Linear(6, 5).double()
    inputs = torch.randn(4, 3, 6, dtype=torch.float64).unbind()

    def encode(number: int) -> Tensor:
        return tower(inputs[number]) if number % 2 else inputs[number][:, :5]

    def loss_of(embeddings: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(embeddings)).prod(dim=0).square().sum()

    grad_cache.backward(encode, range(4), loss_of, CPU, keep=keep)
    found = [tower.weight.grad, tower.bias.grad]
    expected = torch.autograd.grad(loss_of([encode(number) for number in range(4)]), tower.parameters())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_differs_between_micro_batches() -> None:
    # Otherwise the equality above would also hold for a cache with a single random state.
    dropout = nn.Dropout(0.5)
    outputs: list[Tensor] = []

    def encode(inputs: Tensor) -> Tensor:
        outputs.append(dropout(inputs))
        return outputs[-1]

    ones = torch.ones(3, 50, requires_grad=True)
    grad_cache.backward(encode, ones.split(1), lambda embeddings: torch.cat(list(embeddings)).square().sum(), CPU)
    first, second = outputs[:3], outputs[:2:-1]
    for before, recomputed in zip(first, second, strict=True):
        assert torch.equal(before, recomputed)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_the_random_state_of_the_caller_is_restored() -> None:
    torch.manual_seed(5)
    state = grad_cache.RandomState(CPU)
    expected = torch.rand(4)
    with state.restored():
        assert torch.equal(torch.rand(4), expected)
    after = copy.deepcopy(torch.get_rng_state())
    with state.restored():
        torch.rand(100)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.gpu
def test_cached_gradients_equal_direct_gradients_on_a_gpu() -> None:
    device = torch.device("cuda")
    results = []
    for keep in (0, 2, 5):
        tower = network().to(device)
        inputs = torch.randn(24, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
        torch.manual_seed(3)
        grad_cache.backward(
            tower, inputs.split(5), lambda embeddings: torch.cat(list(embeddings)).sin().sum(), device, keep=keep
        )
        results.append([parameter.grad for parameter in tower.parameters()])
    for recomputed, partly_kept, direct in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, direct, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(partly_kept, direct, rtol=1e-12, atol=1e-14)
