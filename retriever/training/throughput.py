"""How fast a run goes: pairs and tokens a second, memory, and the time left."""

from __future__ import annotations

import time

import torch

from retriever.data.micro_batches import PreparedBatch
from retriever.distributed.ranks import Ranks
from retriever.utils.device import memory_in_use_mib


class ThroughputMeter:
    """Pairs and tokens since the last reading, per second, and the time left."""

    def __init__(self, device: torch.device, ranks: Ranks | None = None):
        self.device = device
        self.ranks = ranks or Ranks()
        self.started = self.since = time.perf_counter()
        self.pairs = self.tokens = self.steps = 0

    def add(self, batch: PreparedBatch) -> None:
        """Count a batch."""
        self.steps += 1
        self.pairs += batch.queries
        self.tokens += batch.tokens

    def rates(self) -> dict[str, float]:
        """Readings since the last call: pairs/s and real tokens/s (padding not counted) of all ranks together, and
        the memory, in MiB, of the rank that has most in use. Every rank calls it."""
        now = time.perf_counter()
        seconds = now - self.since
        pairs, tokens = self.ranks.all_reduce_sum(self.pairs, self.tokens)
        rates = {
            "pairs_per_second": round(pairs / seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_mib": round(self.ranks.all_reduce_max(memory_in_use_mib(self.device)), 1),
        }
        self.since, self.pairs, self.tokens = now, 0, 0
        return rates

    def skip(self) -> None:
        """Leave the time since the last reading out of the next one: it went into something else."""
        self.since = time.perf_counter()

    def time_left(self, steps: int) -> str:
        """Hours, minutes and seconds that so many steps will take at the rate so far."""
        seconds = round((time.perf_counter() - self.started) / max(1, self.steps) * steps)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
