"""Which passages are taken as hard negatives, and which pairs are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Sampling = Literal["top", "random"]


@dataclass(frozen=True)
class MiningOptions:
    """Which passages are taken as hard negatives, and which pairs are kept.

    The candidates of a query are the distinct texts that score highest for it, without its positives. A candidate is
    compared with the best positive of its row; with several limits, it must meet all of them.

    Raises:
        ValueError: If a value is out of range; the message begins with its name.
    """

    negatives: int = 7
    """Maximum number of negatives per row. 0: only filter pairs or score positives."""
    depth: int = 100
    """The last rank of a candidate; at least `negatives` candidates after `skip` are considered."""
    skip: int = 0
    """Number of best candidates that are skipped, because many of them may be unjudged positives."""
    max_share: float | None = 0.95
    """Candidates that score above this share of the positive's score are dropped, 0 to 1 (NV-Retriever, arXiv
    2407.15831). None: no such limit."""
    margin: float | None = None
    """Candidates must score at least this much below the positive. None: no such limit."""
    max_score: float | None = None
    """Candidates that score higher are dropped. None: no such limit."""
    min_score: float | None = None
    """Candidates that score lower are dropped. None: no such limit."""
    sampling: Sampling = "top"
    """top: the candidates of highest score. random: a random choice among the candidates."""
    seed: int = 0
    """Seed of the random choice."""
    keep_top: int | None = None
    """A pair is kept only if its passage is among this many best texts of its query, other positives not counted. None:
    all pairs are kept."""
    keep_identical_ids: bool = False
    """Whether passages that have the id of their query and are not judged for it are candidates."""

    def __post_init__(self) -> None:
        for name, minimum in (("negatives", 0), ("depth", 1), ("skip", 0), ("seed", 0), ("keep_top", 1)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name}: expected at least {minimum}, found {value}")
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise ValueError(f"max_share: expected more than 0 and at most 1, found {self.max_share}")
        for name in ("margin", "max_score", "min_score"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, found {value}")
        if self.sampling not in ("top", "random"):
            raise ValueError(f"sampling: expected top or random, found {self.sampling}")

    @property
    def candidates(self) -> int:
        """Number of candidates that are searched for per query."""
        return max(self.depth, self.skip + self.negatives, self.keep_top or 0, 1)
