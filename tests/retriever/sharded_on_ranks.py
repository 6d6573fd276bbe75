"""Script `sharded_on_ranks.py CONFIG [RANK]`: train sharded towers on 3 ranks, resume on 2 and 1, and compare.

Every process is a fork of this one, which has imported the libraries.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from forks import on_ranks
from run_helpers import assert_near, results
from safetensors.torch import load_file

from index.progress import SilentReporter
from retriever.cli.terminal import Terminal
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import load_config
from retriever.distributed.context import joined_ranks
from retriever.models.sharded_tensors import local_part
from retriever.training.trainer import Trainer


def trained(config: TrainConfig, out: Path, *, resume: bool = False) -> Callable[[], None]:
    """Return a function that trains a run to its end and checks that each rank holds only its share of the weights."""
    begun = dataclasses.replace(config, out=str(out))

    def run() -> None:
        torch.set_num_threads(1)
        with joined_ranks() as ranks:
            terminal = Terminal() if ranks.is_first else SilentReporter()
            trainer = Trainer.resume(out, terminal, ranks) if resume else Trainer.start(begun, terminal, ranks)
            trainer.train()
            held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
            moments = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            for tensors in (held, moments):
                total, local = (sum(tensor.numel() for tensor in part) for part in (tensors, map(local_part, tensors)))
                assert local <= 1.1 * total / ranks.world_size, (local, total)

    return run


def assert_same_model(one: Path, other: Path) -> None:
    """Check that model folders have the same files, with weights equal up to rounding."""
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (one, other)]
    assert names[0] == names[1]
    for file in one.rglob("*.safetensors"):
        mine, theirs = load_file(file), load_file(other / file.relative_to(one))
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert float((tensor - theirs[name]).abs().max()) < 2e-5, (file, name)


def main(config_file: str, rank: str = "0") -> None:
    """Compare all runs. `rank` is the rank of LoRA."""
    out, config = Path("runs"), load_config(Path(config_file))
    # Two towers: ranks must run the micro-batches of the same tower at the same time.
    lora = dataclasses.replace(config.model.lora, rank=int(rank))
    dev = dataclasses.replace(config.dev, at_start=False)
    model, optim = (
        dataclasses.replace(config.model, shared=False, lora=lora),
        dataclasses.replace(config.optim, ema=0.5),
    )
    config = dataclasses.replace(
        config, shard_towers=True, model=model, optim=optim, dev=dev, steps=5, checkpoint_every=3
    )
    # Each resumed run takes two steps more.
    on_ranks(1, trained(config, out / "1"))
    run = out / "sharded"
    for size in (3, 2, 1):
        on_ranks(size, trained(config, run, resume=run.exists()))
        assert_near(results(run), results(out / "1"))
        assert_same_model(run / "model", out / "1" / "model")
        print(size, flush=True)
        # The next ranks resume from the first checkpoint.
        for folder in sorted((run / "checkpoints").iterdir())[1:]:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
