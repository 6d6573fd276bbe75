"""All positives of each query text of a run's sources, so that none of them is trained as a negative of that query.

A batch shows one positive of a query. Others may be in it as positives or negatives of other queries. The pairs of all
rows of all sources are therefore kept as digests of their texts, on disk, for the queries that have several.
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
from retriever.data.false_negatives import Integers, normalize_whitespace, ranges
from retriever.data.table import ExampleTable

VERSION = 2
ROWS_AT_ONCE = 2**16
PAIRS_AT_ONCE = 2**22
"""Pairs that are sorted in memory at once; more are split by their query first."""


def digests(texts: Iterable[str]) -> Integers:
    """64 bits of BLAKE2b of each text without its spacing, int64. Two of a million texts share theirs once in 37
    million batches, and then a passage is not a negative of one query."""
    compared = (normalize_whitespace(text).encode() for text in texts)
    content = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in compared)
    return np.frombuffer(content, dtype="<i8").astype(np.int64)


class KnownPositives:
    """The positives of the query texts that have more than one, in memory-mapped files; picklable.

    `len` is the number of such queries.
    """

    def __init__(self, path: Path) -> None:
        """Open what `open_known_positives` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        self.path = path
        try:
            content = np.lib.format.open_memmap(path, mode="r")
            if content.ndim != 1 or content.dtype != np.int64 or len(content) < 3:
                raise ValueError("expected a row of 64-bit integers")
            queries, positives = content[:2].tolist()
            if len(content) != 4 + 2 * queries + positives:
                raise ValueError(f"expected {queries} queries and {positives} positives, found {len(content)} numbers")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: cannot be read (remove it to make it anew): {error}") from None
        self._content = content
        self._queries = content[3 : 3 + queries]
        self._offsets = content[3 + queries : 4 + 2 * queries]
        self._positives = content[4 + 2 * queries :]

    def verify(self) -> None:
        """Compare all bytes with their checksum.

        Raises:
            InputError: they differ.
        """
        if _checksum(self._content[3:]) != self._content[2]:
            raise InputError(f"{self.path}: damaged, its checksum differs: remove it to make it anew")

    def __len__(self) -> int:
        return len(self._queries)

    def __reduce__(self) -> tuple[type[KnownPositives], tuple[Path]]:
        return KnownPositives, (self.path,)

    def pairs(self, queries: Integers, passages: Integers) -> Integers:
        """[K, 2]: which of these queries and passages, by digest, form a known pair."""
        queries, passages = np.unique(queries), np.unique(passages)
        place = np.searchsorted(self._queries, queries)
        inside = place < len(self._queries)
        place, queries = place[inside], queries[inside]
        found = self._queries[place] == queries
        place, queries = place[found], queries[found]
        starts, counts = self._offsets[place], self._offsets[place + 1] - self._offsets[place]
        # Of a query with more positives than the batch has passages, the passages are looked up, not the positives.
        few = counts <= len(passages)
        pairs = [
            np.stack([np.repeat(queries[few], counts[few]), self._positives[ranges(starts[few], counts[few])]], axis=1)
        ]
        for query, start, count in zip(queries[~few], starts[~few], counts[~few], strict=True):
            own = self._positives[start : start + count]
            at = np.searchsorted(own, passages)
            at[at == count] = 0
            answers = passages[own[at] == passages]
            pairs.append(np.stack([np.full(len(answers), query), answers], axis=1))
        return np.concatenate(pairs)


def find_known_positives(tables: Sequence[ExampleTable], cache: Path, reporter: Reporter) -> KnownPositives:
    """`open_known_positives`, with a progress bar and a line that says how many queries have several positives."""
    rows = sum(len(table) for table in tables)
    with reporter.bar("find queries with several positives", rows, "rows") as advance:
        known = open_known_positives(tables, cache, progress=advance)
    if len(known):
        have = "1 query has" if len(known) == 1 else f"{len(known):,} queries have"
        reporter.line(f"{have} several positives in the data, which are never used as negatives of the same query")
    return known


def open_known_positives(
    tables: Sequence[ExampleTable], cache: Path, *, progress: Callable[[int], None] | None = None
) -> KnownPositives:
    """Find the known positives of the tables' rows together, unless `cache` holds them.

    Takes a few hundred MiB of memory, and 16 bytes a pair on the disk while it works. Several processes may do it at
    once.

    Args:
        progress: called with the number of rows read since its last call.
    """
    about = " ".join([str(VERSION), *sorted(table.sha256 for table in tables)])
    path = cache / f"known-{hashlib.sha256(about.encode()).hexdigest()[:24]}.npy"
    if not path.exists():
        with atomic_path(path) as temporary:
            rows = sum(len(table) for table in tables)
            _write(temporary, list(_parts(_all_pairs(tables, progress), rows, cache)))
    known = KnownPositives(path)
    known.verify()
    return known


def _all_pairs(tables: Sequence[ExampleTable], progress: Callable[[int], None] | None) -> Iterator[Integers]:
    """[n, 2] digests of query and positive, some rows at a time."""
    for table in tables:
        for queries, positives in table.texts(ROWS_AT_ONCE):
            counts = [len(some) for some in positives]
            of_query = np.repeat(digests(queries), counts)
            yield np.stack([of_query, digests(text for some in positives for text in some)], axis=1)
            if progress is not None:
                progress(len(queries))


def _parts(pairs: Iterable[Integers], rows: int, folder: Path) -> Iterator[tuple[Integers, Integers, Integers]]:
    """(queries, positives a query, positives) of ascending ranges of queries."""
    bits = max(0, (rows // PAIRS_AT_ONCE)).bit_length()
    if not bits:
        yield _several(np.concatenate([np.empty((0, 2), np.int64), *pairs]))
        return
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(1 << bits)]
        for some in pairs:
            # In the order of signed numbers.
            part = (some[:, 0] >> (64 - bits)) + (1 << (bits - 1))
            for number in np.unique(part).tolist():
                files[number].write(some[part == number].tobytes())
        for file in files:
            file.seek(0)
            yield _several(np.frombuffer(file.read(), dtype=np.int64).reshape(-1, 2))


def _several(pairs: Integers) -> tuple[Integers, Integers, Integers]:
    """Queries with more than one positive, sorted, how many each has, and these, sorted for each query."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    new = np.ones(len(pairs), dtype=bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    pairs = pairs[new]
    queries, counts = np.unique(pairs[:, 0], return_counts=True)
    more = counts > 1
    return queries[more], counts[more], pairs[np.repeat(more, counts), 1]


def _write(path: Path, parts: Sequence[tuple[Integers, Integers, Integers]]) -> None:
    queries, counts, positives = (np.concatenate(column) for column in zip(*parts, strict=True))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    body = np.concatenate([queries, offsets, positives]).astype(np.int64)
    content = np.concatenate([[len(queries), len(positives), _checksum(body)], body]).astype(np.int64)
    with path.open("wb") as file:
        np.save(file, content, allow_pickle=False)


def _checksum(content: Integers) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for first in range(0, len(content), ROWS_AT_ONCE):
        digest.update(content[first : first + ROWS_AT_ONCE].tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
