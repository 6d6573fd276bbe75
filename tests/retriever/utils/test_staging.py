"""Copies to a GPU through staging buffers are correct, even if the host modifies its tensors at once."""

from __future__ import annotations

import pytest
import torch

from retriever.training import grad_cache
from retriever.utils.staging import Staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_copies_are_correct_while_the_device_is_busy_and_memory_is_bounded() -> None:
    staging, busy = Staging(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    tensors = [torch.randint(0, 256, (3 + number % 5, 1 << 18), dtype=torch.uint8) for number in range(40)]
    # cuBLAS allocates its workspace in the first product.
    busy @ busy
    allocated, sums = torch.cuda.memory_allocated(), []
    for tensor in tensors:
        busy @ busy
        sums.append(staging.to_device(tensor).sum(dtype=torch.int64))
        # The host tensor may be modified immediately.
        expected = tensor.clone()
        tensor.zero_()
        tensor.copy_(expected)
    assert [int(total) for total in sums] == [int(tensor.sum(dtype=torch.int64)) for tensor in tensors]
    assert torch.cuda.memory_allocated() - allocated <= 2 * max(tensor.nbytes for tensor in tensors) + (1 << 20)


@pytest.mark.parametrize("keep", [0, 2])
def test_offloaded_embeddings_give_the_same_gradients(keep: int) -> None:
    torch.manual_seed(0)
    tower, device = torch.nn.Linear(64, 512, device="cuda"), torch.device("cuda")
    inputs = list(torch.randn(5, 3000, 64, device="cuda").unbind())

    def gradient(on_host: bool) -> torch.Tensor:
        tower.zero_grad()
        grad_cache.backward(
            tower,
            inputs,
            lambda embeddings: torch.cat(list(embeddings)).to(device).square().sum(),
            device,
            keep=keep,
            on_host=on_host,
        )
        assert tower.weight.grad is not None
        return tower.weight.grad.clone()

    assert torch.equal(gradient(True), gradient(False))
