"""One of two ranks: loss modules in users' training loops. Run by test_own_loops.py."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize

from losses import InfCLLoss, SigmoidLoss


class Model(nn.Module):
    """A tower and its loss."""

    def __init__(self, loss: InfCLLoss | SigmoidLoss) -> None:
        super().__init__()
        self.tower, self.loss = nn.Linear(6, 5), loss

    def forward(self, query: Tensor, passage: Tensor) -> Tensor:
        return self.loss(normalize(self.tower(query), dim=1), normalize(self.tower(passage), dim=1))


def train(model: Model, queries: Tensor, passages: Tensor, *, ranks: bool) -> dict[str, Tensor]:
    """Three steps of SGD on this rank's rows, or on all rows; returns the full parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rows = slice(distributed.get_rank(), None, 2) if ranks else slice(None)
    for step in range(3):
        model(queries[step, rows], passages[step, rows]).backward()
        if ranks:
            # As in docs/design/losses.md: FSDP2 averages the gradients of sharded parameters only.
            for parameter in model.loss.parameters():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.detach()
        for name, value in model.named_parameters()
    }


def check_fsdp(kind: type[InfCLLoss | SigmoidLoss]) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, passages = torch.randn(2, 3, 8, 6, generator=generator)
    torch.manual_seed(1)
    alone = Model(kind(logit_scale=5.0))
    torch.manual_seed(1)
    sharded = Model(kind(logit_scale=5.0, group=distributed.group.WORLD))
    mesh = distributed.init_device_mesh("cpu", (2,))
    fully_shard(sharded, mesh=mesh, ignored_params=set(sharded.loss.parameters()))
    start = float(sharded.loss.logit_scale)
    expected, found = train(alone, queries, passages, ranks=False), train(sharded, queries, passages, ranks=True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert float(sharded.loss.logit_scale) != start


def main() -> None:
    distributed.init_process_group("gloo")
    for kind in (InfCLLoss, SigmoidLoss):
        check_fsdp(kind)
    distributed.barrier()
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
