"""Steps whose rows come from one topic cluster of one source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from retriever.data.false_negatives import Integers
from retriever.data.schedules.schedule import BatchSchedule, source_shares


class ClusteredSchedule:
    """The rows of every step, all from one cluster of one source (Merrick, arXiv 2407.18887).

    Passages of the same topic are harder negatives. Each cluster is traversed as a source of its own, see
    `BatchSchedule`.

    Args:
        clusters: For each source the rows of each of its clusters.
        batch_size: Rows of a batch.
        seed: Seed of the random order.
        weights: See `BatchSchedule`, for each source.
        temperature: See `BatchSchedule`, for each source.
        epochs: Number of passes. Exactly one of `epochs` and `steps` must be given.
        steps: Number of batches.
        names: Names of the sources in messages.
        processes: Number of processes that share a batch. Default: 1.

    Raises:
        InputError: If a source has too few rows.
    """

    def __init__(
        self,
        clusters: Sequence[Sequence[Integers]],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float | None] | None = None,
        temperature: float = 1.0,
        epochs: float | None = None,
        steps: int | None = None,
        names: Sequence[str],
        processes: int = 1,
    ) -> None:
        self._rows = [rows for of_source in clusters for rows in of_source]
        self._source = [source for source, of_source in enumerate(clusters) for _ in of_source]
        self._names = list(names)
        self.sizes = [sum(map(len, of_source)) for of_source in clusters]
        self.seed, self.batch_size = seed, batch_size
        shares = source_shares([max(size, batch_size) for size in self.sizes], weights, temperature)
        self._steps = BatchSchedule(
            [len(rows) for rows in self._rows],
            batch_size=batch_size,
            seed=seed,
            weights=[
                float(shares[source]) * len(rows) / self.sizes[source]
                for source, rows in zip(self._source, self._rows, strict=True)
            ],
            epochs=epochs,
            steps=steps,
            names=[self._names[source] for source in self._source],
            processes=processes,
        )

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._steps)

    @property
    def largest_step(self) -> int:
        """The first step with the largest number of rows."""
        return self._steps.largest_step

    def blocks(self, step: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """Return (source, rows) of the only block of a step, as `MixedSchedule.blocks`."""
        cluster, positions = self._steps.rows(step)
        return [(self._source[cluster], self._rows[cluster][positions])]

    def describe(self) -> list[str]:
        """Return lines that describe the clusters and the share of each source."""
        lines = []
        counts = np.zeros(len(self.sizes), np.int64)
        for step in range(len(self)):
            counts[self.blocks(step)[0][0]] += 1
        for source, (name, count) in enumerate(zip(self._names, counts.tolist(), strict=True)):
            sizes = [len(rows) for of, rows in zip(self._source, self._rows, strict=True) if of == source]
            share = f"{count:,} of {len(self):,} batches ({count / len(self):.1%})"
            lines.append(f"{name}: {share}, from {len(sizes)} clusters of {min(sizes):,} to {max(sizes):,} rows")
        return lines


def merge_small(assignment: Integers, centroids: np.ndarray, minimum: int) -> list[Integers]:
    """Return the rows of each cluster, after clusters with fewer than `minimum` rows were merged with the nearest one.

    Args:
        assignment: [rows] the cluster of each row.
        centroids: [K, D] unit vectors.
        minimum: Minimum number of rows of a cluster.
    """
    centroids = centroids.astype(np.float64)
    sizes = np.bincount(assignment, minlength=len(centroids))
    target = np.arange(len(centroids))
    remaining = set(np.flatnonzero(sizes).tolist())
    while len(remaining) > 1 and sizes[smallest := min(remaining, key=lambda c: (sizes[c], c))] < minimum:
        remaining.remove(smallest)
        others = np.array(sorted(remaining))
        nearest = int(others[np.argmax(centroids[others] @ centroids[smallest])])
        target[target == smallest] = nearest
        sizes[nearest] += sizes[smallest]
    merged = target[assignment]
    return [np.flatnonzero(merged == cluster) for cluster in sorted(remaining)]
