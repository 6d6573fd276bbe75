"""Exports to files: Parquet, and indexes of usearch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from index.files import InputError, atomic_path
from index.passages import Passage, read_stored_passages
from index.store.shards import passage_line
from retriever.searching.export.engine import Engine

if TYPE_CHECKING:
    import pyarrow

# A usearch index is saved after so many seconds of adding; each save writes all of it. Of a large index, after this
# many times the seconds of the last save.
SAVE_SECONDS = 10.0
SAVE_TIMES = 20


class Parquet(Engine):
    """Parquet files in a folder, one for each batch, in the columns row, id, title, text, fields (JSON) and vector."""

    def errors(self) -> tuple[type[Exception], ...]:
        import pyarrow

        return (pyarrow.ArrowException,)

    def _open(self) -> None:
        self._folder = Path(self.where) / self.name
        self._folder.mkdir(parents=True, exist_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.parquet"))

    def rows(self) -> int:
        from pyarrow import parquet

        return sum(parquet.read_metadata(path).num_rows for path in self._files())

    def passages(self, rows: Sequence[int]) -> list[Passage]:
        from pyarrow import parquet

        found: dict[int, Passage] = {}
        for path in self._files():
            table = parquet.read_table(path, columns=["row", "id", "title", "text", "fields"], filters=_among(rows))
            for row in table.to_pylist():
                found[row["row"]] = Passage(row["id"], row["title"], row["text"], json.loads(row["fields"]))
        return [found[row] for row in rows if row in found]

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        from pyarrow import parquet

        with atomic_path(self._folder / f"{first:012d}.parquet") as path:
            parquet.write_table(table_of(first, passages, vectors), path)

    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        from pyarrow import parquet

        found: list[list[tuple[float, int]]] = [[] for _ in queries]
        for path in self._files():
            table = parquet.read_table(path, columns=["row", "vector"])
            vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.dim)
            rows = table["row"].to_numpy()
            for number, products in enumerate(queries @ vectors.T):
                best = np.argsort(-products)[:k]
                pairs = [*found[number], *zip((-products[best]).tolist(), rows[best].tolist(), strict=True)]
                found[number] = sorted(pairs)[:k]
        return [[row for _, row in one] for one in found]

    def close(self) -> None:
        # Every file was closed after it was written.
        del self._folder


class Usearch(Engine):
    """An index of usearch (HNSW) in NAME.usearch of a folder, whose keys are the row numbers, and beside it the
    passages in NAME.usearch.jsonl, one line for each row."""

    extra = "usearch"

    def errors(self) -> tuple[type[Exception], ...]:
        return RuntimeError, ValueError

    def _open(self) -> None:
        from usearch.index import Index

        self._path = Path(self.where) / f"{self.name}.usearch"
        self._lines = self._path.with_name(f"{self._path.name}.jsonl")
        self._index: Any = Index(ndim=self.dim, metric="ip", dtype="f32")
        if self._path.exists():
            self._index = Index.restore(str(self._path))
            if (found := self._index.ndim) != self.dim:
                raise InputError(f"{self._path}: expected vectors of {self.dim} dimensions, found {found}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._lines.open("ab")
        self._keep_lines(len(self._index))
        self._saved_rows, self._next_save = len(self._index), time.monotonic() + SAVE_SECONDS

    def _keep_lines(self, rows: int) -> None:
        """Drop the passages after those of the first `rows`, which an interrupted run wrote before their vectors."""
        with self._lines.open("rb") as stream:
            kept = [len(line) for line in islice(stream, rows)]
        if len(kept) < rows:
            raise InputError(f"{self._lines}: expected {rows} lines, as in {self._path.name}, found {len(kept)}")
        self._stream.truncate(sum(kept))

    def rows(self) -> int:
        return len(self._index)

    def passages(self, rows: Sequence[int]) -> list[Passage]:
        self._stream.flush()
        wanted = set(rows)
        read = enumerate(read_stored_passages(self._lines)) if wanted else ()
        found = {row: passage for row, passage in read if row in wanted}
        return [found[row] for row in rows if row in found]

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        self._stream.writelines(passage_line(each, f"row {row}") for row, each in enumerate(passages, start=first))
        self._index.add(np.arange(first, first + len(passages), dtype=np.uint64), vectors)
        if time.monotonic() > self._next_save:
            self._save()

    def _save(self) -> None:
        started = time.monotonic()
        # Passages first: lines that the index does not have yet are dropped when it is opened.
        self._stream.flush()
        os.fsync(self._stream.fileno())
        with atomic_path(self._path) as path:
            self._index.save(str(path))
        done = time.monotonic()
        self._saved_rows, self._next_save = len(self._index), done + max(SAVE_SECONDS, SAVE_TIMES * (done - started))

    def finish(self) -> None:
        from usearch.index import Index

        if self._saved_rows != len(self._index):
            self._save()
        # What is verified is the file.
        self._index = Index.restore(str(self._path), view=True)

    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        found = [self._index.search(query, k, exact=True) for query in queries]
        return [[int(row) for row in each.keys] for each in found]

    def close(self) -> None:
        # An interrupted run is continued from here.
        if self._saved_rows != len(self._index):
            self._save()
        self._stream.close()


def table_of(first: int, passages: Sequence[Passage], vectors: np.ndarray) -> pyarrow.Table:
    """Rows from `first` on as a table, the fields as JSON."""
    import pyarrow

    values = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1), pyarrow.float32())
    return pyarrow.table(
        {
            "row": pyarrow.array(range(first, first + len(passages)), pyarrow.int64()),
            **{name: [getattr(passage, name) for passage in passages] for name in ("id", "title", "text")},
            "fields": [json.dumps(dict(passage.fields), ensure_ascii=False) for passage in passages],
            "vector": pyarrow.FixedSizeListArray.from_arrays(values, vectors.shape[1]),
        }
    )


def _among(rows: Sequence[int]) -> list[tuple[str, str, list[int]]]:
    return [("row", "in", list(rows))]
