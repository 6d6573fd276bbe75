"""The measured settings of an index, and the one that was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from index.ann.settings import Settings
from index.ann.tuning.recall import CONFIDENCE, Target


@dataclass(frozen=True)
class Point:
    """One measured setting."""

    settings: Settings
    recall: float
    """Mean recall over the queries."""
    at_least: float
    """Lower end of the confidence interval of the mean recall."""
    microseconds: float
    """Wall-clock time per query, in one batch on `Tuning.threads` threads."""
    compared: float | None
    """Codes compared per query, as counted by faiss: a cost that does not depend on the load of the machine. None on a
    GPU, where faiss does not count them."""
    core_microseconds: float | None = None
    """Processor time per query on one thread; only for settings that were timed, and not on a GPU."""

    def as_json(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {
            **self.settings.known(),
            "recall": round(self.recall, 6),
            "at_least": round(self.at_least, 6),
            "microseconds": round(self.microseconds, 2),
            **({} if self.compared is None else {"compared": round(self.compared, 1)}),
            **({} if self.core_microseconds is None else {"core_microseconds": round(self.core_microseconds, 2)}),
        }


@dataclass(frozen=True)
class Tuning:
    """What was measured and chosen."""

    target: Target
    chosen: Point
    curve: list[Point]
    """Every measured setting, by time."""
    queries: int
    threads: int
    advice: str = ""
    """What to change if the target is not reached."""
    device: str = "cpu"
    """Where it was measured."""

    @property
    def met(self) -> bool:
        """Whether the chosen setting reaches the target."""
        return self.chosen.at_least >= self.target.recall

    def line(self) -> str:
        """The result in one line of text."""
        measured = f"recall@{self.target.k} {self.chosen.recall:.4f}, at least {self.chosen.at_least:.4f}"
        if self.chosen.core_microseconds is None:
            cost = f"{self.chosen.microseconds:,.1f} µs a query on {self.device}"
        else:
            cost = f"{self.chosen.core_microseconds:,.0f} µs of one core a query"
        settings = str(self.chosen.settings) if self.chosen.settings.known() else ""
        if self.met:
            by = f" by {settings}" if settings else ""
            return f"recall target {self.target.recall:g} met{by}: {measured}; {cost}"
        by = f", by {settings}" if settings else ""
        return f"recall target {self.target.recall:g} NOT met: the best found is {measured}{by}; {self.advice}"

    def as_json(self) -> dict[str, Any]:
        """The "tuning" field of the manifest."""
        return {
            "target_recall": self.target.recall,
            "k": self.target.k,
            "met": self.met,
            "queries": self.queries,
            "queries_from": "passages held out" if self.target.queries is None else "queries",
            "confidence": CONFIDENCE,
            "threads": self.threads,
            **({} if self.device == "cpu" else {"device": self.device}),
            "chosen": self.chosen.as_json(),
            "curve": [point.as_json() for point in self.curve],
        }
