"""Configuration of hard negatives that are mined during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retriever.config.checks import check_at_least


@dataclass(frozen=True)
class MiningConfig:
    """Hard negatives that are mined during training, with mine_every."""

    mined_negatives: int = 7
    """Maximum number of hard negatives per row; data.negatives of them are drawn at each step."""
    depth: int = 100
    """Number of candidates per query: the texts with the highest scores, without positives."""
    skip: int = 0
    """Number of best candidates that are skipped."""
    max_share: float | None = 0.95
    """Candidates that score above this share of the best positive's score are dropped, because many of them are
    unjudged positives. None: no such limit."""
    sampling: Literal["top", "random"] = "top"
    """Which candidates are used. top: those with the highest scores. random: a random choice."""

    def __post_init__(self) -> None:
        check_at_least(self, "mining.", 1, "mined_negatives", "depth")
        check_at_least(self, "mining.", 0, "skip")
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise ValueError(f"mining.max_share: expected more than 0 and at most 1, found {self.max_share}")
