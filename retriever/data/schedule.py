"""Which rows make the batch of a step: a pure function of the seed and the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from index.files import InputError

# The second word of every random generator's key, so that no two uses draw the same numbers.
_SOURCES, _ORDER = 1, 2


class BatchSchedule:
    """The order of training, the same for any number of workers and wherever it is entered.

    Every batch comes from one source (negatives of another source are too easy). Sources get batches in exact
    proportion to their weights, in random order. Each source walks through a random permutation of its rows, then
    through another; a batch that ends one permutation is filled up from the next with rows that it does not hold yet,
    so every row comes once an epoch and never twice in a batch. Beside others a source of fewer rows than a batch gives
    smaller batches: each is the whole source.

    Holds 9 bytes a step (to 256 sources), and one permutation of each source once it is reached.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float | None] | None = None,
        epochs: float | None = None,
        steps: int | None = None,
        names: Sequence[str] | None = None,
        processes: int = 1,
    ) -> None:
        """Plan `steps` batches, or as many whole batches as `epochs` times the rows of all sources fill.

        Args:
            sizes: rows of each source.
            weights: relative share of each source in the batches; None is its number of rows, or that of a batch where
                it has fewer, so that each epoch has the source once.
            names: of the sources, for messages.
            processes: that share a batch; each has at least one row of it.

        Raises:
            ValueError: an argument is out of range, or not exactly one of `epochs` and `steps` is given.
            InputError: the only source has fewer rows than a batch, or one of several too few for a batch of its own.
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
        weighing = [max(size, batch_size) for size in sizes]
        if steps is None:
            assert epochs is not None
            steps = math.floor(epochs * sum(weighing) / batch_size)
        if steps < 1:
            raise InputError(f"epochs, steps: expected at least one batch of {batch_size} rows, found {steps}")
        self.batch_size = batch_size
        self.seed = seed
        self._sizes = list(sizes)
        self._names = list(names)
        self._weights = list(weights or [None] * len(sizes))
        shares = [rows if weight is None else weight for rows, weight in zip(weighing, self._weights, strict=True)]
        self._source = _draw_sources(np.array(shares, dtype=np.float64), steps, seed)
        # How many earlier batches came from the same source.
        self._turn = np.zeros(steps, dtype=np.int64)
        for source in range(len(sizes)):
            mine = self._source == source
            self._turn[mine] = np.arange(np.count_nonzero(mine))
        self._orders: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._source)

    def batch_rows(self, source: int) -> int:
        """Rows of a batch of this source: `batch_size`, or all that it has."""
        return min(self.batch_size, self._sizes[source])

    @property
    def largest_step(self) -> int:
        """The first step whose batch no other exceeds in rows."""
        rows = np.minimum(self.batch_size, np.array(self._sizes))
        return int(np.argmax(rows[self._source]))

    def lines(self) -> list[str]:
        """How several sources share the batches, for a person to read; nothing of one source."""
        if len(self._sizes) == 1:
            return []
        lines = []
        for source, name in enumerate(self._names):
            count = int(np.count_nonzero(self._source == source))
            line = f"{name}: {count:,} of {len(self):,} batches ({count / len(self):.1%})"
            if (rows := self.batch_rows(source)) < self.batch_size:
                line += f", of {rows} rows each, all that it has"
            lines.append(line)
        weighed = [name for name, weight in zip(self._names, self._weights, strict=True) if weight is not None]
        if 0 < len(weighed) < len(self._names):
            lines.append(f"{', '.join(weighed)}: weights beside sources without one, which weigh their numbers of rows")
        return lines

    def rows(self, step: int) -> tuple[int, npt.NDArray[np.int64]]:
        """The source of a step's batch, and its rows there, int64 [batch_rows(source)], all different.

        Raises:
            IndexError: the step is not one of 0 ... len(self) - 1.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        source = int(self._source[step])
        size, wanted = self._sizes[source], self.batch_rows(source)
        epoch, start = divmod(int(self._turn[step]) * wanted, size)
        rows = self._order(source, epoch)[start : start + wanted]
        missing = wanted - len(rows)
        if missing:
            rows = np.concatenate([rows, self._order(source, epoch + 1)[:missing]])
        return source, rows.astype(np.int64)

    def _order(self, source: int, epoch: int) -> npt.NDArray[np.int64]:
        """The rows of a source in the order of one epoch.

        It begins where the epoch before it left a batch unfinished, so that the rows of that batch come later.
        """
        size, wanted = self._sizes[source], self.batch_rows(source)
        known, order = self._orders.get(source, (-1, np.empty(0, dtype=np.int64)))
        if known == epoch:
            return order
        # Only the first places of an epoch, as many as a batch has, are rearranged. With two batches or more the end of
        # the epoch before is beyond them and known at once; a smaller source must be followed from its first epoch,
        # unless its epochs are whole batches.
        first = 0
        if size % wanted == 0:
            first = epoch
        elif size >= 2 * wanted:
            first = max(epoch - 1, 0)
        if first <= known < epoch:
            first = known + 1
        else:
            order = order[:0]
        for number in range(first, epoch + 1):
            unfinished = order[len(order) - number * size % wanted :]
            order = np.random.default_rng([self.seed, _ORDER, source, number]).permutation(size)
            order = _put_later(order, unfinished, wanted)
        self._orders[source] = (epoch, order)
        return order


def _check_sizes(sizes: Sequence[int], batch_size: int, processes: int, names: Sequence[str]) -> None:
    """Refuse sources that are too small: a query needs another passage than its own, and each process a query."""
    for size, name in zip(sizes, names, strict=True):
        if len(sizes) == 1 and size < batch_size:
            raise InputError(f"{name}: expected at least {batch_size} rows, one batch, found {size}")
        least = min(batch_size, max(2, processes))
        if size < least:
            why = f", one for each of {processes} processes" if processes > 2 else ""
            raise InputError(f"{name}: expected at least {least} rows{why}, found {size}")


def _put_later(order: npt.NDArray[np.int64], taken: npt.NDArray[np.int64], batch_size: int) -> npt.NDArray[np.int64]:
    """Rearrange the first `batch_size` places so that the `taken` rows among them come last, all else in order."""
    head = order[:batch_size]
    is_taken = np.isin(head, taken)
    return np.concatenate([head[~is_taken], head[is_taken], order[batch_size:]])


def _draw_sources(shares: npt.NDArray[np.float64], steps: int, seed: int) -> npt.NDArray[np.unsignedinteger]:
    """The source of each step: counts by largest remainder, order at random."""
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ValueError(f"weights: expected positive numbers, found {shares.tolist()}")
    exact = shares / shares.sum() * steps
    counts = np.floor(exact).astype(np.int64)
    most_short = np.argsort(counts - exact, kind="stable")
    counts[most_short[: steps - counts.sum()]] += 1
    sources = np.repeat(np.arange(len(shares), dtype=np.min_scalar_type(len(shares) - 1)), counts)
    np.random.default_rng([seed, _SOURCES]).shuffle(sources)
    return sources
