"""Texts by key: passages on disk, and the known positives of each query."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from index.files import InputError, parse_json
from index.passages import Passage, folded, parse_passage
from index.records import Record
from retriever.data.false_negatives import concatenated_ranges
from retriever.data.table import ExampleTable

Keys = npt.NDArray[np.uint64]
"""uint64 array: hashes of texts."""

BATCH_ROWS = 2**14
# Copies of a passage have the same vector up to rounding.
MAX_COPIES = 16


def text_key(text: str) -> int:
    """Hash a text to 64 bits. Texts that differ only in case and white space are equal.

    A collision costs one candidate. In a corpus of ten million texts it happens with probability 1 in 370,000.
    """
    # Training replaces NUL by U+FFFD.
    content = folded(text.replace("\0", "\ufffd")).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def text_keys(texts: Iterable[str]) -> Keys:
    """Return the keys of texts, uint64 [texts]."""
    return np.fromiter(map(text_key, texts), np.uint64)


class PassageTexts:
    """The passages of JSON lines files, read by row. 32 bytes of memory per passage.

    Attributes:
        keys: uint64 [N], the key of each passage's text.
    """

    def __init__(self, files: Sequence[Path], progress: Callable[[int], None] | None = None) -> None:
        """Read all passages once.

        Args:
            files: The files of an embedding store or of indexes, in the order of their rows.
            progress: Called with the number of passages read since the last call.

        Raises:
            InputError: A line is not a passage.
        """
        self._files = list(files)
        keys, offsets, ends = array("Q"), array("Q"), []
        for path in self._files:
            offset = 0
            with path.open("rb") as stream:
                for line in stream:
                    keys.append(text_key(_parsed(line, path, offset).content))
                    offsets.append(offset)
                    offset += len(line)
                    if progress is not None:
                        progress(1)
            ends.append(len(keys))
        self.keys: Keys = np.frombuffer(keys, np.uint64) if keys else np.empty(0, np.uint64)
        self._offsets = offsets
        self._ends = np.array(ends)
        self._order = np.argsort(self.keys, kind="stable")
        self._sorted = self.keys[self._order]

    def __len__(self) -> int:
        return len(self.keys)

    def contents(self, rows: Iterable[int]) -> dict[int, str]:
        """Return row -> title and text, of the rows given."""
        texts: dict[int, str] = {}
        wanted = np.unique(np.fromiter(rows, np.int64))
        file_of = np.searchsorted(self._ends, wanted, side="right")
        for number in np.unique(file_of).tolist():
            path = self._files[number]
            with path.open("rb") as stream:
                for row in wanted[file_of == number].tolist():
                    stream.seek(self._offsets[row])
                    texts[row] = _parsed(stream.readline(), path, self._offsets[row]).content
        return texts

    def rows_of(self, keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Find the passages with given keys, at most 16 copies of each.

        Args:
            keys: [n]

        Returns:
            Positions in `keys` and rows, both int64 [matches].
        """
        starts = np.searchsorted(self._sorted, keys)
        counts = np.minimum(np.searchsorted(self._sorted, keys, side="right") - starts, MAX_COPIES)
        positions = np.repeat(np.arange(len(keys)), counts)
        return positions, self._order[concatenated_ranges(starts, counts)]


def _parsed(line: bytes, path: Path, offset: int) -> Passage:
    place = f"{path}: byte {offset}"
    try:
        fields = parse_json(line.decode(), place)
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: expected UTF-8, found: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(fields).__name__}")
    return parse_passage(Record(place, fields))


class KnownPairs:
    """Pairs of query and passage keys, by query. 16 bytes of memory per pair."""

    def __init__(self, queries: Keys, passages: Keys) -> None:
        """Sort pairs.

        Args:
            queries: [P] keys of queries.
            passages: [P] keys of passages.
        """
        order = np.lexsort((passages, queries))
        queries, passages = queries[order], passages[order]
        is_first = np.ones(len(queries), bool)
        is_first[1:] = (queries[1:] != queries[:-1]) | (passages[1:] != passages[:-1])
        self._queries, self._passages = queries[is_first], passages[is_first]

    @classmethod
    def of_table(cls, table: ExampleTable, progress: Callable[[int], None] | None = None) -> KnownPairs:
        """Return the pairs of a query and a positive over all rows of a table."""
        queries, passages = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for texts, positives in table.texts(BATCH_ROWS):
            queries.append(np.repeat(text_keys(texts), [len(group) for group in positives]))
            passages.append(text_keys(text for group in positives for text in group))
            if progress is not None:
                progress(len(texts))
        return cls(np.concatenate(queries), np.concatenate(passages))

    def of(self, query: int) -> Keys:
        """Return the distinct passage keys of a query key, sorted."""
        key = np.uint64(query)
        start, stop = np.searchsorted(self._queries, key), np.searchsorted(self._queries, key, side="right")
        return self._passages[start:stop]
