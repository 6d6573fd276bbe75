"""What an evaluation will take: lengths of texts against a model's maximum; time, memory and disk."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.preflight import Preflight

MIB = 2**20
# Of a Python text of some ten letters and its place in a set, while passages are embedded: none may come twice.
BYTES_AN_ID = 150
# While passages are searched: where ids lie on disk; two windows of vectors; candidates, and products of a block.
BYTES_A_ROW = 2
WINDOWS_BYTES = 2 * 256 * MIB
SEARCH_BYTES = 96 * MIB


@dataclass(frozen=True)
class Lengths:
    """Token counts of a sample of texts."""

    counts: np.ndarray
    """int [texts], special tokens included, not cut."""
    limit: int | None
    """The model's maximum; none where it has none."""

    @property
    def mean_read(self) -> float:
        """Mean number of tokens that the model reads of a text."""
        read = self.counts if self.limit is None else np.minimum(self.counts, self.limit)
        return float(read.mean()) if len(read) else 0.0

    @property
    def cut(self) -> float:
        """Share of texts that are longer than the maximum, 0 to 1."""
        return float((self.counts > self.limit).mean()) if self.limit and len(self.counts) else 0.0

    def histogram(self) -> dict[str, int]:
        """Texts by number of tokens, in powers of two: "1-16", "17-32", …"""
        if not len(self.counts):
            return {}
        edges = [0, 16]
        while edges[-1] < int(self.counts.max()):
            edges.append(2 * edges[-1])
        return {
            f"{low + 1}-{high}": int(((self.counts > low) & (self.counts <= high)).sum())
            for low, high in itertools.pairwise(edges)
        }

    def __str__(self) -> str:
        if not len(self.counts):
            return "none"
        middle, late = np.percentile(self.counts, [50, 95])
        bins = "  ".join(f"{name}: {count:,}" for name, count in self.histogram().items() if count)
        limit = "no maximum" if self.limit is None else f"{self.cut:.1%} above the maximum of {self.limit:,}"
        return f"median {middle:,.0f}, 95 % {late:,.0f}, longest {int(self.counts.max()):,} tokens; {limit}  [{bins}]"


@dataclass(frozen=True)
class Estimate:
    """What the evaluation of one set will take, about."""

    tokens: float
    """That the model will read, of corpus and queries."""
    seconds: float | None
    """For encoding; none without a measured speed."""
    memory: int
    """Bytes at the most, beside the model and the memory-mapped vectors: of encoding or of searching, exactly or by an
    index."""
    disk: int
    """Bytes of the store, the run files and an index that is built."""
    free: int
    """Bytes on the disk of the report."""

    def __str__(self) -> str:
        time = "" if self.seconds is None else f"about {_span(self.seconds)} of encoding, "
        return (
            f"{time}{self.tokens:,.0f} tokens, {self.memory / MIB:,.0f} MiB of memory beside the model, "
            f"{self.disk / MIB:,.0f} MiB on disk ({self.free / MIB:,.0f} MiB free)"
        )


def estimate(
    found: Preflight,
    lengths: dict[str, Lengths],
    *,
    dim: int,
    k: int,
    out: Path,
    tokens_per_second: float | None = None,
    dtype_bytes: int = 4,
    shard_rows: int = 65536,
    index: int = 0,
    build: bool = False,
) -> Estimate:
    """Time, memory and disk for one set.

    Args:
        found: its preflight.
        lengths: of "query" and "document".
        dim: D of the vectors.
        k: passages a query in the run.
        out: the folder of the report, there or not yet.
        tokens_per_second: of the model, measured.
        dtype_bytes: of a number on disk.
        shard_rows: rows of a shard, held until it is whole.
        index: bytes of the index that is searched beside; 0 without one.
        build: whether it is built here, with a copy of the texts.
    """
    tokens = found.passages * lengths["document"].mean_read + found.queries * lengths["query"].mean_read
    shard = min(shard_rows, found.passages)
    text = found.bytes / max(1, found.passages)
    places = found.queries * (min(k, found.passages) + 1)
    encoding = found.passages * BYTES_AN_ID + shard * (dim * 4 + 2 * text)
    # The run twice while a query's own passage is dropped from it, and search results as int64 and float32.
    results = places * 28 + found.queries * dim * 8
    windows = min(found.passages * dim * dtype_bytes, WINDOWS_BYTES)
    memory = max(encoding, found.passages * BYTES_A_ROW + windows + SEARCH_BYTES + results)
    disk = found.passages * (dim * dtype_bytes + 32) + found.bytes * 1.1 + places * 40
    if index:
        memory = max(memory, index + 2 * results)
        disk += places * 40 + (index + found.passages * 32 + found.bytes * 1.1 if build else 0)
    place = out
    while not place.exists():
        place = place.parent
    seconds = tokens / tokens_per_second if tokens_per_second else None
    return Estimate(tokens, seconds, int(memory), int(disk), shutil.disk_usage(place).free)


def warn_of_lengths(found: Preflight, lengths: dict[str, Lengths]) -> None:
    """Count the texts of the sample that the model would cut as a warning of the set."""
    for side, of_side in lengths.items():
        if of_side.limit and of_side.cut:
            what = f"{side} texts longer than the model's maximum, of which it reads only the beginning"
            share = f"{of_side.cut:.1%} of a sample of {len(of_side.counts):,}"
            found.add(what, f"{share}, longest {int(of_side.counts.max()):,} of {of_side.limit:,} tokens")
            found.findings[what].count = int((of_side.counts > of_side.limit).sum())


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
