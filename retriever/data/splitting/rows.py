"""The rows of a source and further passages as JSON in a temporary file, with the position of each distinct text."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from index.files import InputError, read_at
from index.passages import PassageFile, file_state
from retriever.config.sources import SourceConfig
from retriever.data.false_negatives import Integers
from retriever.data.sources import Notices, read_examples, source_files
from retriever.data.splitting.query_groups import Digests

PENDING = 2**20
"""Number of new texts after which duplicates are removed."""


class TextPositions:
    """Digests of distinct texts, with the position of each text's JSON in a file. 24 bytes per text."""

    def __init__(self) -> None:
        self._known = (np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
        self._pending = (array("Q"), array("q"), array("q"))

    def add(self, digest: int, start: int, length: int) -> None:
        """Add a text. If its digest is present, the first position is kept."""
        for column, value in zip(self._pending, (digest, start, length), strict=True):
            column.append(value)
        if len(self._pending[0]) >= max(PENDING, len(self._known[0])):
            self._merge()

    def sorted(self) -> tuple[Digests, Integers, Integers]:
        """Return digests, starts and lengths of all texts, sorted by digest."""
        if self._pending[0]:
            self._merge()
        return self._known

    def _merge(self) -> None:
        digests, starts, lengths = (
            np.concatenate([known, np.array(new, known.dtype)])
            for known, new in zip(self._known, self._pending, strict=True)
        )
        digests, first = np.unique(digests, return_index=True)
        self._known = (digests, starts[first], lengths[first])
        self._pending = (array("Q"), array("q"), array("q"))


class SplitRows:
    """The rows to split: their texts in a temporary file, their digests in memory.

    Texts are stripped of surrounding white space.

    Args:
        file: An empty file, opened for reading and writing.

    Attributes:
        queries: The distinct queries.
        passages: The distinct passages: positives, negatives and further passages.
        rows: Number of rows.
        negatives: Number of rows with a hard negative.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.queries, self.passages = TextPositions(), TextPositions()
        self.rows = self.negatives = 0
        self._file = file
        self._end = 0
        self._rows = (array("Q"), array("Q"), array("q"), array("q"))
        self._pairs = (array("Q"), array("Q"))

    def read_source(self, config: SourceConfig, notices: Notices, progress: Callable[[int], None]) -> None:
        """Read the rows of a source.

        Args:
            config: The source.
            notices: Receives counts of skipped rows and corrected texts.
            progress: Called with the number of rows read since the last call.

        Raises:
            InputError: As `read_examples`, or if there is no row, or a file changed meanwhile.
        """
        before = [(path, file_state(path)) for path in source_files(config)]
        for example in read_examples(config, notices):
            positives = list(dict.fromkeys(text.strip() for text in example.positives))
            stripped = list(dict.fromkeys(text.strip() for text in example.negatives))
            negatives = [text for text in stripped if text not in positives]
            if len(negatives) < len(stripped):
                kind = "rows with a negative dropped because it equals one of their positives except for white space"
                notices.add(kind, f"query {example.query!r:.60}")
            self._add_row(example.query.strip(), positives, negatives)
            progress(1)
        if not self.rows:
            raise InputError("; ".join([f"{config.path}: expected at least one example, found none", *notices.lines()]))
        if before != [(path, file_state(path)) for path in source_files(config)]:
            raise InputError(f"{config.path}: changed while it was read")

    def read_passages(self, path: Path, notices: Notices, progress: Callable[[int], None]) -> int:
        """Read the passages of a corpus file; title and text become one text.

        Args:
            path: The corpus file.
            notices: Receives counts of skipped passages.
            progress: Called with the number of passages read since the last call.

        Returns:
            The number of passages whose text was already present.

        Raises:
            InputError: If a row is broken, or the file changed meanwhile.
        """
        count_before, read = len(self.passages.sorted()[0]), 0
        for passage in PassageFile(path):
            # As in `read_examples`: tokenizers written in C would truncate the text at the NUL.
            text = passage.content.replace("\0", "\ufffd")
            if text:
                content = _encoded(text)
                self.passages.add(_digest(text), self._end, len(content))
                self._write(content)
                read += 1
            else:
                notices.add("passages skipped for an empty text", f"{path}: {passage.id}")
            progress(1)
        return read - (len(self.passages.sorted()[0]) - count_before)

    def pairs(self) -> tuple[Digests, Digests]:
        """Return the queries and positives of the distinct pairs, sorted by query, then by positive."""
        queries, positives = (np.array(column, np.uint64) for column in self._pairs)
        order = np.lexsort((positives, queries))
        queries, positives = queries[order], positives[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (queries[1:] != queries[:-1]) | (positives[1:] != positives[:-1])
        return queries[is_first], positives[is_first]

    @property
    def pair_count(self) -> int:
        """Number of pairs of all rows, duplicates included."""
        return len(self._pairs[0])

    def row_queries(self) -> Digests:
        """Return the query of each row, in an order that does not depend on the order of the source."""
        return np.array(self._rows[0], np.uint64)[self._order()]

    def row_spans(self) -> tuple[Integers, Integers]:
        """Return the start and length of each row's line, in the order of `row_queries`."""
        order = self._order()
        return np.array(self._rows[2], np.int64)[order], np.array(self._rows[3], np.int64)[order]

    def read(self, starts: Integers, lengths: Integers) -> Iterator[bytes]:
        """Yield the bytes at these positions of the file."""
        self._file.flush()
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            yield read_at(self._file.fileno(), length, start)

    def _order(self) -> Integers:
        return np.argsort(np.array(self._rows[1], np.uint64), kind="stable")

    def _add_row(self, query: str, positives: list[str], negatives: list[str]) -> None:
        line = bytearray()

        def put(texts: TextPositions, text: str) -> int:
            content, digest = _encoded(text), _digest(text)
            texts.add(digest, self._end + len(line), len(content))
            line.extend(content)
            return digest

        line += b'{"query": '
        query_digest = put(self.queries, query)
        for key, texts in ((b"positive", positives), (b"negatives", negatives)):
            line += b', "' + key + b'": ['
            for number, text in enumerate(texts):
                line += b", " if number else b""
                passage = put(self.passages, text)
                if texts is positives:
                    self._pairs[0].append(query_digest)
                    self._pairs[1].append(passage)
            line += b"]"
        line += b"}"
        key_digest = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
        for column, value in zip(self._rows, (query_digest, key_digest, self._end, len(line)), strict=True):
            column.append(value)
        self.rows += 1
        self.negatives += bool(negatives)
        self._write(bytes(line))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._end += len(content)


def _encoded(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
