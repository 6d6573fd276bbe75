"""The rows of a batch that belong to one process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The part of every batch that one of several processes has: consecutive rows, as many as others or one more."""

    rank: int = 0
    size: int = 1

    def of(self, rows: int) -> range:
        """Places within a batch of so many rows."""
        return range(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)
