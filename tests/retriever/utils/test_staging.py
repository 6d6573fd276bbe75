"""What is brought to a GPU through staging buffers is what was on the host, however fast the host goes on."""

from __future__ import annotations

import pytest
import torch

from retriever.training import grad_cache
from retriever.utils.staging import Staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_tensors_arrive_whole_while_the_device_is_busy_and_the_buffers_stay_two() -> None:
    staging, busy = Staging(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    sent = [torch.randint(0, 256, (3 + number % 5, 1 << 18), dtype=torch.uint8) for number in range(40)]
    # The vendor's library keeps a workspace from its first product on.
    busy @ busy
    held, arrived = torch.cuda.memory_allocated(), []
    for tensor in sent:
        busy @ busy
        arrived.append(staging.to_device(tensor).sum(dtype=torch.int64))
        # The host may use its own again at once.
        expected = tensor.clone()
        tensor.zero_()
        tensor.copy_(expected)
    assert [int(total) for total in arrived] == [int(tensor.sum(dtype=torch.int64)) for tensor in sent]
    assert torch.cuda.memory_allocated() - held <= 2 * max(tensor.nbytes for tensor in sent) + (1 << 20)


@pytest.mark.parametrize("keep", [0, 2])
def test_embeddings_that_wait_on_the_host_give_the_same_gradients(keep: int) -> None:
    torch.manual_seed(0)
    tower, device = torch.nn.Linear(64, 512, device="cuda"), torch.device("cuda")
    inputs = list(torch.randn(5, 3000, 64, device="cuda").unbind())

    def gradient(on_host: bool) -> torch.Tensor:
        tower.zero_grad()
        grad_cache.backward(
            tower,
            inputs,
            lambda some: torch.cat(list(some)).to(device).square().sum(),
            device,
            keep=keep,
            on_host=on_host,
        )
        assert tower.weight.grad is not None
        return tower.weight.grad.clone()

    assert torch.equal(gradient(True), gradient(False))
