"""One of two ranks: loss modules in users' training loops. Run by test_own_loops.py."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from losses import InfCLLoss, SigmoidLoss


class Model(nn.Module):
    """A tower and its loss."""

    def __init__(self, loss: InfCLLoss | SigmoidLoss) -> None:
        super().__init__()
        # In float64, because the order of sums differs between one process and two, and between CPUs.
        self.tower, self.loss = nn.Linear(6, 5, dtype=torch.float64), loss

    def forward(self, query: Tensor, passage: Tensor) -> Tensor:
        return self.loss(normalize(self.tower(query), dim=1), normalize(self.tower(passage), dim=1))


def train(
    model: nn.Module,
    queries: Tensor,
    passages: Tensor,
    *,
    ranks: bool,
    not_averaged: Iterable[nn.Parameter] = (),
    average: AveragedModel | None = None,
) -> dict[str, Tensor]:
    """Three steps of SGD on this rank's rows, or on all rows; returns the full parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rows = slice(distributed.get_rank(), None, 2) if ranks else slice(None)
    not_averaged = list(not_averaged)
    for step in range(3):
        model(queries[step, rows], passages[step, rows]).backward()
        # As in docs/design/losses.md: FSDP2 averages the gradients of sharded parameters only.
        for parameter in not_averaged:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(getattr(model, "module", model))
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.detach()
        for name, value in model.named_parameters()
    }


def check_fsdp(kind: type[InfCLLoss | SigmoidLoss]) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, passages = torch.randn(2, 3, 8, 6, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    alone = Model(kind(logit_scale=5.0))
    torch.manual_seed(1)
    sharded = Model(kind(logit_scale=5.0, group=distributed.group.WORLD))
    mesh = distributed.init_device_mesh("cpu", (2,))
    fully_shard(sharded, mesh=mesh, ignored_params=set(sharded.loss.parameters()))
    start = float(sharded.loss.logit_scale)
    expected = train(alone, queries, passages, ranks=False)
    found = train(sharded, queries, passages, ranks=True, not_averaged=sharded.loss.parameters())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert float(sharded.loss.logit_scale) != start


def check_ddp_and_ema(kind: type[InfCLLoss | SigmoidLoss]) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, passages = torch.randn(2, 3, 8, 6, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    alone = Model(kind(logit_scale=5.0))
    torch.manual_seed(1)
    wrapped = DistributedDataParallel(Model(kind(logit_scale=5.0, group=distributed.group.WORLD)))
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for model in (alone, wrapped.module)]
    train(alone, queries, passages, ranks=False, average=averages[0])
    train(wrapped, queries, passages, ranks=True, average=averages[1])
    for one, other in ((alone, wrapped.module), averages):
        for (name, expected), found in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert not torch.equal(averages[1].module.tower.weight, wrapped.module.tower.weight)


def main() -> None:
    distributed.init_process_group("gloo")
    for kind in (InfCLLoss, SigmoidLoss):
        check_fsdp(kind)
        check_ddp_and_ema(kind)
    distributed.barrier()
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
