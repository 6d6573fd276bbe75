"""The rows of a batch that belong to one rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The share of each batch that belongs to one rank: consecutive rows, the same number on all ranks up to one."""

    rank: int = 0
    size: int = 1
    """Number of ranks."""

    def of(self, rows: int) -> range:
        """Return the row numbers of this rank in a batch of `rows` rows."""
        return range(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)
