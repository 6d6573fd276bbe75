"""Steps that have rows of every source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from index.files import InputError
from retriever.data.schedules.schedule import BatchSchedule, source_shares

# Second word of the seeds of the sources; see schedule.py and data/batches.py for the others.
_MIXTURE = 7


class MixedSchedule:
    """The rows of every step, each of which has a block of rows from every source. A pure function of seed and step.

    The sizes of the blocks are the same at every step. They are proportional to the shares of the sources, with at
    least two rows (and one for each process) and at most all rows of a source. Each source is traversed as in
    `BatchSchedule`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float | None] | None = None,
        temperature: float = 1.0,
        epochs: float | None = None,
        steps: int | None = None,
        names: Sequence[str] | None = None,
        processes: int = 1,
    ) -> None:
        """Create a schedule of `steps` batches, or of the full batches in as many rows as `epochs` passes have.

        Args:
            sizes: Number of rows of each source.
            batch_size: Rows of a batch, over all sources.
            seed: Seed of the random order, at least 0.
            weights: Relative number of rows of each source in a batch. Default: None, see `temperature`.
            temperature: Without weights, the share of a source is proportional to its rows to the power of
                1 / temperature. Default: 1.
            epochs: Number of passes. Exactly one of `epochs` and `steps` must be given.
            steps: Number of batches.
            names: Names of the sources in messages. Default: "source 0" and so on.
            processes: Number of processes that share each block. Default: 1.

        Raises:
            ValueError: If not exactly one of `epochs` and `steps` is given.
            InputError: If the sources have fewer rows than a batch, or a batch has too few rows for all sources.
        """
        if (epochs is None) == (steps is None):
            raise ValueError("epochs, steps: expected one of them")
        self.batch_size, self.seed = batch_size, seed
        self._sizes = list(sizes)
        self._names = list(names or [f"source {source}" for source in range(len(sizes))])
        minimum = max(2, processes)
        for size, name in zip(sizes, self._names, strict=True):
            if size < minimum:
                raise InputError(f"{name}: expected at least {minimum} rows, found {size}")
        if sum(sizes) < batch_size:
            raise InputError(
                f"data.sources: expected at least {batch_size} rows (batch_size) in all, found {sum(sizes)}"
            )
        if minimum * len(sizes) > batch_size:
            raise InputError(
                f"batch_size: expected at least {minimum * len(sizes)}, {minimum} rows for each of {len(sizes)} "
                f"sources, found {batch_size}"
            )
        self._rows = _block_rows(source_shares(sizes, weights, temperature), np.array(sizes), batch_size, minimum)
        if steps is None:
            assert epochs is not None
            steps = math.floor(epochs * sum(sizes) / batch_size)
        if steps < 1:
            raise InputError(f"epochs, steps: expected at least one batch of {batch_size} rows, found {steps}")
        self._steps = steps
        self._orders = [
            BatchSchedule(
                [size],
                batch_size=rows,
                seed=int(np.random.SeedSequence([seed, _MIXTURE, source]).generate_state(1, np.uint64)[0]),
                steps=steps,
            )
            for source, (size, rows) in enumerate(zip(self._sizes, self._rows, strict=True))
        ]

    def __len__(self) -> int:
        """Number of steps."""
        return self._steps

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each source."""
        return list(self._sizes)

    @property
    def largest_step(self) -> int:
        """The first step with the largest number of rows: 0, because all have the same."""
        return 0

    def blocks(self, step: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """Return (source, distinct rows) of each block of a step.

        Raises:
            IndexError: If the step is not in 0, …, len(self) − 1.
        """
        return [(source, order.rows(step)[1]) for source, order in enumerate(self._orders)]

    def describe(self) -> list[str]:
        """Return a line for each source: its rows in a step, and how often it is traversed."""
        return [
            f"{name}: {rows:,} of {self.batch_size:,} rows of every step ({rows / self.batch_size:.1%}), "
            f"{rows * self._steps / size:.2f} passes"
            for name, rows, size in zip(self._names, self._rows, self._sizes, strict=True)
        ]


def _block_rows(shares: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], total: int, minimum: int) -> list[int]:
    """Divide the rows of a batch: proportional to `shares`, at least `minimum` and at most all rows of a source."""
    low, high = 0.0, float(np.max(sizes / shares))
    for _ in range(200):
        factor = (low + high) / 2
        if np.clip(factor * shares, minimum, sizes).sum() < total:
            low = factor
        else:
            high = factor
    exact = np.clip(low * shares, minimum, sizes)
    rows = np.floor(exact).astype(np.int64)
    # Largest remainders first; the sizes are whole numbers, so that rounding up exceeds none.
    for source in np.argsort(rows - exact, kind="stable"):
        if rows.sum() < total and rows[source] < sizes[source]:
            rows[source] += 1
    # Rounding of the bisection may leave a few rows.
    while (missing := total - int(rows.sum())) != 0:
        room = np.flatnonzero(rows < sizes if missing > 0 else rows > minimum)
        rows[room[np.argmax((exact - rows)[room] * np.sign(missing))]] += np.sign(missing)
    return rows.tolist()
