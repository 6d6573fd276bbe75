"""The rows of every training step, a pure function of the seed and the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from index.files import InputError
from retriever.config.checks import MAX_STEPS

# Second word of the seeds of random generators; every use has its own.
_SOURCES, _ORDER = 1, 2


class BatchSchedule:
    """The rows of every training step. They depend neither on the number of workers nor on the step of resuming.

    Every batch comes from one source, because negatives from another source are too easy. The numbers of batches are
    proportional to the weights of the sources, and their order is random. Each source is traversed in a random
    permutation, then in another one. A batch that ends one permutation is filled with rows of the next one that are not
    in it yet. Every row thus occurs once per epoch and at most once per batch. If there are several sources, a source
    with fewer rows than `batch_size` gives smaller batches, each of which is the whole source.

    Memory: 9 bytes per step (up to 256 sources), and one permutation per source.
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
        """Create a schedule of `steps` batches, or of the full batches in `epochs` passes over all sources.

        Args:
            sizes: Number of rows of each source.
            batch_size: Rows of a batch.
            seed: Seed of the random order, at least 0.
            weights: Relative number of batches of each source. None for a source: its number of rows, but at least
                `batch_size`, so that an epoch has the source once. Default: None for all sources.
            temperature: Without weights, shares are proportional to these numbers of rows to the power of
                1 / temperature: with more than 1, small sources come more often. Default: 1.
            epochs: Number of passes. Exactly one of `epochs` and `steps` must be given.
            steps: Number of batches.
            names: Names of the sources in messages. Default: "source 0" and so on.
            processes: Number of processes that share a batch; each must get at least one row. Default: 1.

        Raises:
            ValueError: If an argument is out of range, or not exactly one of `epochs` and `steps` is given.
            InputError: If a single source has fewer rows than a batch, or one of several sources has too few rows.
        """
        if not sizes:
            raise ValueError("sizes: expected at least one source")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        if seed < 0:
            raise ValueError(f"seed: expected a whole number from 0, found {seed}")
        if (epochs is None) == (steps is None):
            raise ValueError("epochs, steps: expected one of them")
        names = names or [f"source {source}" for source in range(len(sizes))]
        _check_sizes(sizes, batch_size, processes, names)
        epoch_rows = [max(size, batch_size) for size in sizes]
        if steps is None:
            assert epochs is not None
            exact = epochs * sum(epoch_rows) / batch_size
            if exact > MAX_STEPS:
                raise InputError(f"epochs: expected at most {MAX_STEPS:,} steps, found {exact:.3g} ({epochs:g} epochs)")
            steps = math.floor(exact)
        if steps < 1:
            raise InputError(f"epochs, steps: expected at least one batch of {batch_size} rows, found {steps}")
        self.batch_size = batch_size
        self.seed = seed
        self._sizes = list(sizes)
        self._names = list(names)
        self._weights = list(weights or [None] * len(sizes))
        self._source = _draw_sources(source_shares(epoch_rows, weights, temperature), steps, seed)
        # Number of earlier batches from the same source.
        self._turn = np.zeros(steps, dtype=np.int64)
        for source in range(len(sizes)):
            of_source = self._source == source
            self._turn[of_source] = np.arange(np.count_nonzero(of_source))
        self._orders: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._source)

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each source."""
        return list(self._sizes)

    def batch_rows(self, source: int) -> int:
        """Return the number of rows in a batch of a source: `batch_size`, or all its rows if it has fewer."""
        return min(self.batch_size, self._sizes[source])

    @property
    def largest_step(self) -> int:
        """The first step with the largest number of rows."""
        rows = np.minimum(self.batch_size, np.array(self._sizes))
        return int(np.argmax(rows[self._source]))

    def describe(self) -> list[str]:
        """Return lines that describe the share of each source; none for a single source."""
        if len(self._sizes) == 1:
            return []
        lines = []
        for source, name in enumerate(self._names):
            count = int(np.count_nonzero(self._source == source))
            line = f"{name}: {count:,} of {len(self):,} batches ({count / len(self):.1%})"
            if (rows := self.batch_rows(source)) < self.batch_size:
                line += f" of {rows} rows, the whole source"
            lines.append(line)
        weighted = [name for name, weight in zip(self._names, self._weights, strict=True) if weight is not None]
        if 0 < len(weighted) < len(self._names):
            lines.append(f"weights are set for {', '.join(weighted)}; other sources are weighted by their rows")
        return lines

    def blocks(self, step: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """Return (source, rows) of the only block of a step, as `MixedSchedule.blocks`."""
        return [self.rows(step)]

    def rows(self, step: int) -> tuple[int, npt.NDArray[np.int64]]:
        """Return the source of a step and its distinct rows, int64 [batch_rows(source)].

        Raises:
            IndexError: If the step is not in 0, …, len(self) − 1.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        source = int(self._source[step])
        size, batch_rows = self._sizes[source], self.batch_rows(source)
        epoch, start = divmod(int(self._turn[step]) * batch_rows, size)
        rows = self._order(source, epoch)[start : start + batch_rows]
        missing = batch_rows - len(rows)
        if missing:
            rows = np.concatenate([rows, self._order(source, epoch + 1)[:missing]])
        return source, rows.astype(np.int64)

    def _order(self, source: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return the rows of a source in the order of one epoch.

        If the previous epoch ends within a batch, the rows of that batch are not at the beginning of this epoch.
        """
        size, batch_rows = self._sizes[source], self.batch_rows(source)
        cached_epoch, order = self._orders.get(source, (-1, np.empty(0, dtype=np.int64)))
        if cached_epoch == epoch:
            return order
        # Only the first `batch_rows` positions of an epoch depend on the end of the previous epoch. An epoch of two or
        # more batches therefore depends on the previous permutation alone. A smaller source is computed from its first
        # epoch, unless its epochs consist of full batches.
        start = 0
        if size % batch_rows == 0:
            start = epoch
        elif size >= 2 * batch_rows:
            start = max(epoch - 1, 0)
        if start <= cached_epoch < epoch:
            start = cached_epoch + 1
        else:
            order = order[:0]
        for number in range(start, epoch + 1):
            unfinished = order[len(order) - number * size % batch_rows :]
            order = np.random.default_rng([self.seed, _ORDER, source, number]).permutation(size)
            order = _move_back(order, unfinished, batch_rows)
        self._orders[source] = (epoch, order)
        return order


def source_shares(
    rows: Sequence[int], weights: Sequence[float | None] | None, temperature: float
) -> npt.NDArray[np.float64]:
    """Return the weight of each source; where it is None, its rows to the power of 1 / temperature."""
    given = weights or [None] * len(rows)
    # Relative to the largest source, so that no power overflows.
    powers = (np.array(rows, np.float64) / max(rows)) ** (1 / temperature) * max(rows)
    return np.array([power if weight is None else weight for power, weight in zip(powers, given, strict=True)])


def _check_sizes(sizes: Sequence[int], batch_size: int, processes: int, names: Sequence[str]) -> None:
    """Check that a single source fills a batch, and that each source has a row per process and at least two rows."""
    for size, name in zip(sizes, names, strict=True):
        if len(sizes) == 1 and size < batch_size:
            raise InputError(f"{name}: expected at least {batch_size} rows (batch_size), found {size}")
        minimum = min(batch_size, max(2, processes))
        if size < minimum:
            reason = f", one for each of {processes} processes" if processes > 2 else ""
            raise InputError(f"{name}: expected at least {minimum} rows{reason}, found {size}")


def _move_back(order: npt.NDArray[np.int64], taken: npt.NDArray[np.int64], batch_size: int) -> npt.NDArray[np.int64]:
    """Move the `taken` rows among the first `batch_size` ones to the end of these."""
    head = order[:batch_size]
    is_taken = np.isin(head, taken)
    return np.concatenate([head[~is_taken], head[is_taken], order[batch_size:]])


def _draw_sources(shares: npt.NDArray[np.float64], steps: int, seed: int) -> npt.NDArray[np.unsignedinteger]:
    """Draw the source of each step. The counts are rounded by the largest-remainder method; the order is random."""
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ValueError(f"weights: expected positive numbers, found {shares.tolist()}")
    exact = shares / shares.sum() * steps
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: steps - counts.sum()]] += 1
    sources = np.repeat(np.arange(len(shares), dtype=np.min_scalar_type(len(shares) - 1)), counts)
    np.random.default_rng([seed, _SOURCES]).shuffle(sources)
    return sources
