"""Estimates before an evaluation: text lengths against the model's maximum; time, memory and disk."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.sets.preflight import Preflight

MIB = 2**20
# A Python string of about ten characters and its entry in a set, which finds duplicate ids during encoding.
BYTES_PER_ID = 150
# During search: offsets of ids on disk; two windows of embeddings; candidates and the products of a block.
BYTES_PER_ROW = 2
WINDOWS_BYTES = 2 * 256 * MIB
SEARCH_BYTES = 96 * MIB


@dataclass(frozen=True)
class Lengths:
    """Token counts of a sample of texts."""

    counts: np.ndarray
    """int [texts]: tokens of each text before truncation, special tokens included."""
    limit: int | None
    """The model's maximum length in tokens; None if it has none."""

    @property
    def mean_read(self) -> float:
        """Mean number of tokens per text after truncation."""
        read = self.counts if self.limit is None else np.minimum(self.counts, self.limit)
        return float(read.mean()) if len(read) else 0.0

    @property
    def cut(self) -> float:
        """Share of texts longer than the maximum, 0 to 1."""
        return float((self.counts > self.limit).mean()) if self.limit and len(self.counts) else 0.0

    def histogram(self) -> dict[str, int]:
        """Number of texts by length in tokens, in bins of powers of two: "1-16", "17-32", …"""
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
        median, p95 = np.percentile(self.counts, [50, 95])
        bins = "  ".join(f"{name}: {count:,}" for name, count in self.histogram().items() if count)
        limit = "no maximum" if self.limit is None else f"{self.cut:.1%} above the maximum of {self.limit:,}"
        return f"median {median:,.0f}, 95 % {p95:,.0f}, longest {int(self.counts.max()):,} tokens; {limit}  [{bins}]"


@dataclass(frozen=True)
class Estimate:
    """Approximate cost of the evaluation of one set."""

    tokens: float
    """Tokens of corpus and queries after truncation."""
    seconds: float | None
    """Seconds of encoding; None without a measured speed."""
    memory: int
    """Peak bytes of encoding and search, excluding the model and the memory-mapped embeddings."""
    disk: int
    """Bytes of the embedding store, the run files and an index that is built."""
    free: int
    """Free bytes on the disk of the report."""

    def __str__(self) -> str:
        time = "" if self.seconds is None else f"about {_duration(self.seconds)} of encoding, "
        return (
            f"{time}{self.tokens:,.0f} tokens, {self.memory / MIB:,.0f} MiB of memory in addition to the model, "
            f"{self.disk / MIB:,.0f} MiB on disk ({self.free / MIB:,.0f} MiB free)"
        )


def estimate(
    result: Preflight,
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
    """Estimate time, memory and disk for one set.

    Args:
        found: the preflight of the set.
        lengths: lengths of "query" and "document" texts.
        dim: dimension D of the embeddings.
        k: passages per query in the run.
        out: the folder of the report; it need not exist.
        tokens_per_second: measured encoding speed of the model.
        dtype_bytes: bytes per value on disk.
        shard_rows: rows per shard; a shard is held in memory until it is complete.
        index: bytes of an index that is also searched; 0 without one.
        build: whether that index is built, which copies the texts.
    """
    tokens = result.passages * lengths["document"].mean_read + result.queries * lengths["query"].mean_read
    shard = min(shard_rows, result.passages)
    text = result.bytes / max(1, result.passages)
    entries = result.queries * (min(k, result.passages) + 1)
    encoding = result.passages * BYTES_PER_ID + shard * (dim * 4 + 2 * text)
    # The run is held twice while identical ids are removed; search results are int64 and float32.
    results = entries * 28 + result.queries * dim * 8
    windows = min(result.passages * dim * dtype_bytes, WINDOWS_BYTES)
    memory = max(encoding, result.passages * BYTES_PER_ROW + windows + SEARCH_BYTES + results)
    disk = result.passages * (dim * dtype_bytes + 32) + result.bytes * 1.1 + entries * 40
    if index:
        memory = max(memory, index + 2 * results)
        disk += entries * 40 + (index + result.passages * 32 + result.bytes * 1.1 if build else 0)
    existing = out
    while not existing.exists():
        existing = existing.parent
    seconds = tokens / tokens_per_second if tokens_per_second else None
    return Estimate(tokens, seconds, int(memory), int(disk), shutil.disk_usage(existing).free)


def warn_of_lengths(result: Preflight, lengths: dict[str, Lengths]) -> None:
    """Add a warning to `result` for sampled texts that are longer than the model's maximum."""
    for side, of_side in lengths.items():
        if of_side.limit and of_side.cut:
            what = f"{side} texts longer than the model's maximum, of which it reads only the beginning"
            share = f"{of_side.cut:.1%} of a sample of {len(of_side.counts):,}"
            result.add(what, f"{share}, longest {int(of_side.counts.max()):,} of {of_side.limit:,} tokens")
            result.findings[what].count = int((of_side.counts > of_side.limit).sum())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
