"""All positives of the queries of a run, so that none of them is used as a negative of its query.

A batch has one positive of each query. Further positives may be in the batch as positives or negatives of other
queries. For queries with several positives, the pairs of all rows of all sources are therefore stored as text digests
on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from index.files import InputError, atomic_path
from index.progress import Reporter
from index.store.arrays import open_array
from retriever.data.false_negatives import Integers, concatenated_ranges, normalize_whitespace
from retriever.data.table import ExampleTable

VERSION = 2
BATCH_ROWS = 2**16
SORT_PAIRS = 2**22
"""Number of pairs that are sorted in memory at once. More pairs are first partitioned by their query."""


def text_digests(texts: Iterable[str]) -> Integers:
    """Return 64 bits of BLAKE2b of each text, int64 [texts]; equal for texts that differ only in white space.

    Among a million texts two different ones collide with probability 1 in 37 million. The only effect is that a passage
    is not a negative of a query.
    """
    normalized = (normalize_whitespace(text).encode() for text in texts)
    content = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in normalized)
    return np.frombuffer(content, dtype="<i8").astype(np.int64)


class KnownPositives:
    """Memory-mapped digests of the positives of all queries with more than one positive. Picklable.

    `len` is the number of these queries.
    """

    def __init__(self, path: Path) -> None:
        """Open a file that `open_known_positives` wrote.

        Raises:
            InputError: If the file is missing or damaged.
        """
        self.path = path
        try:
            content = open_array(path)
            if content.ndim != 1 or content.dtype != np.int64 or len(content) < 3:
                raise ValueError("expected a one-dimensional array of 64-bit integers")
            queries, positives = content[:2].tolist()
            if len(content) != 4 + 2 * queries + positives:
                raise ValueError(f"expected {queries} queries and {positives} positives, found {len(content)} numbers")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read (remove it to create it again): {error}") from None
        self._content = content
        self._queries = content[3 : 3 + queries]
        self._offsets = content[3 + queries : 4 + 2 * queries]
        self._positives = content[4 + 2 * queries :]

    def verify(self) -> None:
        """Verify the checksum of the file.

        Raises:
            InputError: If the file is damaged.
        """
        if _checksum(self._content[3:]) != self._content[2]:
            raise InputError(f"{self.path}: damaged, its checksum differs: remove it to create it again")

    def __len__(self) -> int:
        return len(self._queries)

    def __reduce__(self) -> tuple[type[KnownPositives], tuple[Path]]:
        return KnownPositives, (self.path,)

    def positives_of(self, queries: Integers) -> tuple[Integers, Integers]:
        """Return all positives of some queries.

        Args:
            queries: [M] digests of queries.

        Returns:
            [K] positions in `queries`, ascending, and [K] digests of positives. Queries with one positive have none.
        """
        position = np.minimum(np.searchsorted(self._queries, queries), max(0, len(self._queries) - 1))
        which = np.flatnonzero(self._queries[position] == queries) if len(self._queries) else np.empty(0, np.int64)
        starts, stops = self._offsets[position[which]], self._offsets[position[which] + 1]
        return np.repeat(which, stops - starts), self._positives[concatenated_ranges(starts, stops - starts)]

    def pairs(self, queries: Integers, passages: Integers) -> Integers:
        """Return known pairs of some queries.

        Args:
            queries: Digests of queries.
            passages: Digests of passages.

        Returns:
            [K, 2] digests of a query and its positive: all known pairs of these queries and passages. For queries with
            few positives, pairs with other passages may be included.
        """
        queries, passages = np.unique(queries), np.unique(passages)
        position = np.searchsorted(self._queries, queries)
        in_range = position < len(self._queries)
        position, queries = position[in_range], queries[in_range]
        is_known = self._queries[position] == queries
        position, queries = position[is_known], queries[is_known]
        starts, counts = self._offsets[position], self._offsets[position + 1] - self._offsets[position]
        # If a query has more positives than there are passages, the passages are searched among the positives.
        few = counts <= len(passages)
        few_positives = self._positives[concatenated_ranges(starts[few], counts[few])]
        pairs = [np.stack([np.repeat(queries[few], counts[few]), few_positives], axis=1)]
        for query, start, count in zip(queries[~few], starts[~few], counts[~few], strict=True):
            positives = self._positives[start : start + count]
            position = np.searchsorted(positives, passages)
            position[position == count] = 0
            matches = passages[positives[position] == passages]
            pairs.append(np.stack([np.full(len(matches), query), matches], axis=1))
        return np.concatenate(pairs)


def find_known_positives(tables: Sequence[ExampleTable], cache: Path, reporter: Reporter) -> KnownPositives:
    """Call `open_known_positives` with a progress bar, and report how many queries have several positives."""
    rows = sum(len(table) for table in tables)
    with reporter.bar("find queries with several positives", rows, "rows") as advance:
        known = open_known_positives(tables, cache, progress=advance)
    if len(known):
        have = "1 query has" if len(known) == 1 else f"{len(known):,} queries have"
        reporter.line(f"{have} several positives, which are never used as negatives of the same query")
    return known


def open_known_positives(
    tables: Sequence[ExampleTable], cache: Path, *, progress: Callable[[int], None] | None = None
) -> KnownPositives:
    """Find the queries with several positives over all tables, unless the result is in the folder `cache`.

    This takes a few hundred MiB of memory and temporarily 16 bytes per pair on disk. Several processes may do it at the
    same time.

    Args:
        tables: The examples of all sources.
        cache: Folder for the result.
        progress: Called with the number of rows read since the last call.

    Raises:
        InputError: If the file in the cache is damaged.
    """
    about = " ".join([str(VERSION), *sorted(table.sha256 for table in tables)])
    path = cache / f"known-{hashlib.sha256(about.encode()).hexdigest()[:24]}.npy"
    if not path.exists():
        with atomic_path(path) as temporary:
            rows = sum(len(table) for table in tables)
            _write(temporary, list(_partitions(_pair_digests(tables, progress), rows, cache)))
    known = KnownPositives(path)
    known.verify()
    return known


def _pair_digests(tables: Sequence[ExampleTable], progress: Callable[[int], None] | None) -> Iterator[Integers]:
    """Yield digests [n, 2] of queries and positives, for BATCH_ROWS rows at a time."""
    for table in tables:
        for queries, positives in table.texts(BATCH_ROWS):
            counts = [len(texts) for texts in positives]
            query_keys = np.repeat(text_digests(queries), counts)
            yield np.stack([query_keys, text_digests(text for texts in positives for text in texts)], axis=1)
            if progress is not None:
                progress(len(queries))


def _partitions(pairs: Iterable[Integers], rows: int, folder: Path) -> Iterator[tuple[Integers, Integers, Integers]]:
    """Yield the result of `_with_several_positives` for ascending ranges of queries."""
    bits = max(0, (rows // SORT_PAIRS)).bit_length()
    if not bits:
        yield _with_several_positives(np.concatenate([np.empty((0, 2), np.int64), *pairs]))
        return
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(1 << bits)]
        for batch in pairs:
            # The digests are signed, so the partitions begin with the most negative ones.
            partition = (batch[:, 0] >> (64 - bits)) + (1 << (bits - 1))
            for number in np.unique(partition).tolist():
                files[number].write(batch[partition == number].tobytes())
        for file in files:
            file.seek(0)
            yield _with_several_positives(np.frombuffer(file.read(), dtype=np.int64).reshape(-1, 2))


def _with_several_positives(pairs: Integers) -> tuple[Integers, Integers, Integers]:
    """Return the sorted queries with more than one positive, their numbers of positives, and the sorted positives."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    is_first = np.ones(len(pairs), dtype=bool)
    is_first[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    pairs = pairs[is_first]
    queries, counts = np.unique(pairs[:, 0], return_counts=True)
    has_several = counts > 1
    return queries[has_several], counts[has_several], pairs[np.repeat(has_several, counts), 1]


def _write(path: Path, parts: Sequence[tuple[Integers, Integers, Integers]]) -> None:
    queries, counts, positives = (np.concatenate(column) for column in zip(*parts, strict=True))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    body = np.concatenate([queries, offsets, positives]).astype(np.int64)
    content = np.concatenate([[len(queries), len(positives), _checksum(body)], body]).astype(np.int64)
    with path.open("wb") as file:
        np.save(file, content, allow_pickle=False)


def _checksum(content: Integers) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, len(content), BATCH_ROWS):
        digest.update(content[start : start + BATCH_ROWS].tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
