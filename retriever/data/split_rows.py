"""The rows of a source and further passages as JSON in one temporary file, with the place of each distinct text."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from index.files import InputError
from index.passages import PassageFile, file_state
from retriever.config.sources import SourceConfig
from retriever.data.false_negatives import Integers
from retriever.data.query_groups import Digests
from retriever.data.sources import Notices, read_examples, source_files

PENDING = 2**20
"""Texts whose places are held before those that were met before are left out."""


class Spans:
    """Distinct texts by digest, each with the place of its JSON in a file: 24 bytes a text."""

    def __init__(self) -> None:
        self._known = (np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
        self._pending = (array("Q"), array("q"), array("q"))

    def add(self, digest: int, start: int, length: int) -> None:
        """Enter a text; of several with one digest the first is kept."""
        for column, value in zip(self._pending, (digest, start, length), strict=True):
            column.append(value)
        if len(self._pending[0]) >= max(PENDING, len(self._known[0])):
            self._merge()

    def sorted(self) -> tuple[Digests, Integers, Integers]:
        """Digest, start and length of all, by digest."""
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
    """All that is to be split: rows in a temporary file, what is known of them in memory.

    Texts are stripped, and equal when they are equal then.

    Attributes:
        queries: distinct texts of queries.
        passages: distinct texts of passages: positives, negatives, and further ones.
        rows: number of rows.
        negatives: number of rows with a hard negative.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """`file`: an empty one, to be written and read while this is used."""
        self.queries, self.passages = Spans(), Spans()
        self.rows = self.negatives = 0
        self._file = file
        self._end = 0
        self._rows = (array("Q"), array("Q"), array("q"), array("q"))
        self._pairs = (array("Q"), array("Q"))

    def read_source(self, config: SourceConfig, notices: Notices, progress: Callable[[int], None]) -> None:
        """Take the rows of a source; `progress` is called with the number of rows read since its last call.

        Raises:
            InputError: as `read_examples`, or there is no row, or a file has changed.
        """
        before = [(path, file_state(path)) for path in source_files(config)]
        for example in read_examples(config, notices):
            positives = list(dict.fromkeys(text.strip() for text in example.positives))
            stripped = list(dict.fromkeys(text.strip() for text in example.negatives))
            negatives = [text for text in stripped if text not in positives]
            if len(negatives) < len(stripped):
                what = "rows with a negative dropped because it is one of their positives but for white space around it"
                notices.add(what, f"query {example.query!r:.60}")
            self._add_row(example.query.strip(), positives, negatives)
            progress(1)
        if not self.rows:
            raise InputError("; ".join([f"{config.path}: expected at least one example, found none", *notices.lines()]))
        if before != [(path, file_state(path)) for path in source_files(config)]:
            raise InputError(f"{config.path}: changed while it was read")

    def read_passages(self, path: Path, notices: Notices, progress: Callable[[int], None]) -> int:
        """Take the passages of a corpus file, title and text as one text; returns how many had one that was known.

        Raises:
            InputError: a row is broken, or the file changed.
        """
        known, taken = len(self.passages.sorted()[0]), 0
        for passage in PassageFile(path):
            # As in the rows of a source: tokenizers written in C end a text at its first NUL.
            text = passage.content.replace("\0", "\ufffd")
            if text:
                content = _encoded(text)
                self.passages.add(_digest(text), self._end, len(content))
                self._write(content)
                taken += 1
            else:
                notices.add("passages skipped for an empty text", f"{path}: {passage.id}")
            progress(1)
        return taken - (len(self.passages.sorted()[0]) - known)

    def pairs(self) -> tuple[Digests, Digests]:
        """Query and positive of every distinct pair, by query, then by positive."""
        queries, positives = (np.array(column, np.uint64) for column in self._pairs)
        order = np.lexsort((positives, queries))
        queries, positives = queries[order], positives[order]
        new = np.ones(len(order), bool)
        new[1:] = (queries[1:] != queries[:-1]) | (positives[1:] != positives[:-1])
        return queries[new], positives[new]

    @property
    def pair_count(self) -> int:
        """Pairs of all rows, those that come again included."""
        return len(self._pairs[0])

    def row_queries(self) -> Digests:
        """The query of each row, in an order that does not depend on that of the source."""
        return np.array(self._rows[0], np.uint64)[self._order()]

    def row_spans(self) -> tuple[Integers, Integers]:
        """Start and length of each row's line, in the order of `row_queries`."""
        order = self._order()
        return np.array(self._rows[2], np.int64)[order], np.array(self._rows[3], np.int64)[order]

    def read(self, starts: Integers, lengths: Integers) -> Iterator[bytes]:
        """The bytes at these places of the file."""
        self._file.flush()
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            yield os.pread(self._file.fileno(), length, start)

    def _order(self) -> Integers:
        return np.argsort(np.array(self._rows[1], np.uint64), kind="stable")

    def _add_row(self, query: str, positives: list[str], negatives: list[str]) -> None:
        line = bytearray()

        def put(texts: Spans, text: str) -> int:
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
