"""The number of steps of the cells of a study, and an estimate of their time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from index.progress import Reporter
from retriever.config.run import TrainConfig
from retriever.data.pool_false_negatives import with_pool_false_negatives
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.training.components import Components, build_components
from retriever.training.validation.dev_set import measure_on_ranks

# Steps that are timed, after one that is not. Fewer if they take longer than this number of seconds.
_TIMED_STEPS, _LONGEST = 3, 30.0


@dataclass(frozen=True)
class Speed:
    """Measured times."""

    pair_seconds: float
    """Seconds of training per pair."""
    evaluation_seconds: float
    """Seconds of an evaluation on the dev sets."""

    def seconds(self, config: TrainConfig, steps: int) -> float:
        """Estimate the seconds of a run."""
        evaluations = -(-steps // config.dev.every) + config.dev.at_start
        return steps * config.batch_size * self.pair_seconds + evaluations * self.evaluation_seconds


def steps_of(configs: Iterable[TrainConfig], folder: Path, reporter: Reporter) -> dict[int, int]:
    """Return batch size -> number of steps, for one configuration of each batch size.

    Raises:
        ConfigError: a configuration is invalid, or has no dev set.
        InputError: a batch is larger than the data, or model, data or dev set cannot be read.
    """
    return {config.batch_size: len(build_components(config, folder, reporter, Ranks()).batches) for config in configs}


def measure_speed(config: TrainConfig, folder: Path, reporter: Reporter) -> Speed:
    """Time some steps and one evaluation of a configuration, without writing a run."""
    parts = build_components(config, folder, reporter, Ranks())
    parts.towers.train()
    seconds = pairs = 0.0
    for number, batch in enumerate(parts.batches.loader(start=0, workers=0)):
        batch = with_pool_false_negatives(batch, parts.ranks, parts.batches.known)
        begin = _now(parts)
        parts.train_step(batch, number)
        spent = _now(parts) - begin
        # The first step compiles kernels and allocates memory. A run of one step has no other.
        if number or len(parts.batches) == 1:
            seconds, pairs = seconds + spent, pairs + batch.queries
        if number >= _TIMED_STEPS or seconds > _LONGEST:
            break
    begin = _now(parts)
    parts.towers.eval()
    assert parts.dev_set is not None
    measure_on_ranks(
        parts.dev_set,
        parts.towers,
        folder,
        EncodeOptions(parts.precision, parts.config.micro_batch_tokens),
        reporter,
        loss=parts.loss,
        tick=lambda: None,
        ranks=parts.ranks,
        sharded=False,
    )
    return Speed(seconds / pairs, _now(parts) - begin)


def _now(parts: Components) -> float:
    if parts.device.type == "cuda":
        torch.cuda.synchronize(parts.device)
    return time.perf_counter()
