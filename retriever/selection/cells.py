"""The cells of a study: one training run for each batch size, learning rate and seed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retriever.config.run import TrainConfig
from retriever.errors import ConfigError

Scaling = Literal["sqrt", "linear", "none"]

_RATES = ("lr", "query_lr", "passage_lr", "projection_lr", "logit_scale_lr")


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    batch_size: int
    lr: float
    """Learning rate at the batch size of the configuration, before it is scaled."""
    seed: int
    factor: float
    """Factor of all learning rates at this batch size."""

    @property
    def name(self) -> str:
        """Name of the folder of the run."""
        return f"batch{self.batch_size}_lr{self.lr:g}_seed{self.seed}"

    def config(self, base: TrainConfig, folder: Path, cache: Path) -> TrainConfig:
        """The configuration of the run, in `folder` and with the data cache `cache` that all runs share.

        Raises:
            ConfigError: A value of the cell is not allowed.
        """
        try:
            optim = dataclasses.replace(base.optim, lr=self.lr)
            rates = {name: rate * self.factor for name in _RATES if (rate := getattr(optim, name)) is not None}
            return dataclasses.replace(
                base,
                out=str(folder),
                batch_size=self.batch_size,
                seed=self.seed,
                optim=dataclasses.replace(optim, **rates),
                data=dataclasses.replace(base.data, cache=base.data.cache or str(cache)),
                keep_checkpoints=1,
            )
        except ValueError as error:
            raise ConfigError(f"cell {self.name}: {error}") from None


def scaling_factor(batch_size: int, base: int, scaling: Scaling) -> float:
    """Return the factor of the learning rate at a batch size, relative to that at the batch size `base`.

    "sqrt": √(batch / base), which keeps the noise of Adam's updates (Malladi et al., arXiv 2205.10287). "linear":
    batch / base (Goyal et al., arXiv 1706.02677, for SGD). "none": 1.
    """
    ratio = batch_size / base
    return {"sqrt": ratio**0.5, "linear": ratio, "none": 1.0}[scaling]


def all_cells(
    base: TrainConfig, batch_sizes: Sequence[int], rates: Sequence[float], seeds: Sequence[int], scaling: Scaling
) -> list[Cell]:
    """Return the cells in the order in which they run: a seed after the other, so that early results cover the grid."""
    return [
        Cell(batch, rate, seed, scaling_factor(batch, base.batch_size, scaling))
        for seed, batch, rate in itertools.product(seeds, batch_sizes, rates)
    ]
