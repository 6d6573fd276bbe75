"""A teacher's scores in a training batch, aligned with its passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from retriever.data.false_negatives import Integers


@dataclass(frozen=True)
class TeacherLists:
    """For each query of a batch, a list of passages with the scores that a teacher gave them.

    The list of a query whose row has scores is its drawn positive, its further positives and its drawn negatives. The
    list of any other query is empty. The arrays are `passages`, `offsets` and `scores` of `losses.TeacherScores`.
    """

    passages: Integers
    """[P] rows of the passages: positives, further positives, then negatives. With several ranks: rows of this rank's
    share, until `with_pool_false_negatives` makes them rows of the pool."""
    offsets: Integers
    """[M + 1]: the list of query i is passages[offsets[i] : offsets[i + 1]]."""
    scores: npt.NDArray[np.float32]
    """[P] scores, as in the data."""

    @classmethod
    def of(cls, lists: Sequence[Sequence[tuple[int, float]]]) -> TeacherLists:
        """Return the lists of a batch, given as (passage row, score) for each query."""
        flat = [entry for entries in lists for entry in entries]
        return cls(
            np.array([row for row, _ in flat], np.int64),
            np.concatenate([[0], np.cumsum([len(entries) for entries in lists])]).astype(np.int64),
            np.array([score for _, score in flat], np.float32),
        )

    def shifted(self, rows: int) -> TeacherLists:
        """Return the lists with `rows` added to every passage row."""
        return replace(self, passages=self.passages + rows)
