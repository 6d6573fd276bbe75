"""Examples on disk: every source is converted once into a memory-mapped Arrow file and read from there by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from index.files import InputError, atomic_path, read_json, sha256_file, write_json
from retriever.config.sources import SourceConfig
from retriever.data.sources import Example, Notices, read_examples, resolve_format, source_files

VERSION = 3
"""Raised when the conversion changes, so that files of an older one are not taken for its result."""
BATCH_ROWS = 4096
BATCH_CHARACTERS = 2**24


class ExampleTable:
    """The examples of one source, read by row from a memory-mapped file; picklable, so workers open their own.

    Attributes:
        name: path of the source, for messages.
        notices: one line for each kind of row or text that was skipped or mended in the conversion.
        sha256: of the converted rows: equal for equal examples in equal order, wherever their files lie.
        rows_with_negatives: how many rows have a hard negative.
        rows_skipped: how many rows of the source are not here, for want of a query or a positive.
    """

    name: str
    notices: list[str]
    sha256: str
    rows_with_negatives: int
    rows_skipped: int

    def __init__(self, path: Path) -> None:
        """Open a converted file.

        Raises:
            InputError: the file is missing or damaged.
        """
        import pyarrow

        self.path = path
        about = read_json(path.with_suffix(".json"))
        self.name, self.notices = about["source"]["path"], about["notices"]
        self.sha256, self.rows_with_negatives = about["sha256"], about["rows_with_negatives"]
        self.rows_skipped = about["rows_skipped"]
        try:
            rows = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: cannot be read (remove it to convert {self.name} anew): {error}") from None
        self._size = rows.num_rows
        self._columns = [rows.column(name) for name in ("query", "positives", "negatives")]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> Example:
        """The example of a row, 0 <= row < len(self)."""
        if not 0 <= row < self._size:
            raise IndexError(f"row {row} of {self._size}")
        query, positives, negatives = (column[int(row)].as_py() for column in self._columns)
        return Example(query, tuple(positives), tuple(negatives))

    def texts(self, rows: int) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Queries and their positives in order, at most so many rows at a time."""
        queries, positives, _ = self._columns
        for first in range(0, self._size, rows):
            yield queries.slice(first, rows).to_pylist(), positives.slice(first, rows).to_pylist()

    def __reduce__(self) -> tuple[type[ExampleTable], tuple[Path]]:
        return ExampleTable, (self.path,)


def open_source(config: SourceConfig, cache: Path, *, progress: Callable[[int], None] | None = None) -> ExampleTable:
    """Open a source's examples, converting them into the folder `cache` unless that was done before.

    The conversion takes constant memory, and its result is known by the source's path, columns and split and by the
    size and modification time of its files. (A dataset of the Hugging Face hub is therefore read once; a pinned
    revision or another `cache` reads it anew.) Several processes may do it at once.

    Args:
        progress: called with the number of rows converted since its last call.

    Raises:
        InputError: the source is missing, broken or empty; the message names the file and line.
    """
    about = _identity(config)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    path = cache / f"{key}.arrow"
    # The description is written last: where it stands, the rows are whole.
    if not (path.exists() and path.with_suffix(".json").exists()):
        notices = Notices()
        with atomic_path(path) as temporary:
            rows, with_negatives = _write_rows(temporary, read_examples(config, notices), progress)
            if rows == 0:
                raise InputError(
                    "; ".join([f"{config.path}: expected at least one example, found none", *notices.lines()])
                )
            if _identity(config) != about:
                raise InputError(f"{config.path}: changed while it was read")
            content = sha256_file(temporary)
        found = {
            "rows": rows,
            "rows_with_negatives": with_negatives,
            "rows_skipped": notices.count("rows skipped"),
            "sha256": content,
            "notices": notices.lines(),
        }
        write_json(path.with_suffix(".json"), {**about, **found})
    return ExampleTable(path)


def _identity(config: SourceConfig) -> dict[str, Any]:
    """All that a conversion's result depends on."""
    read = {
        name: value
        for name, value in asdict(config).items()
        if name not in ("weight", "query_prompt", "passage_prompt")
    }
    files = [
        {"path": str(file.resolve()), "bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}
        for file in source_files(config)
    ]
    return {"version": VERSION, "source": {**read, "format": resolve_format(config)}, "files": files}


def _write_rows(path: Path, examples: Iterable[Example], progress: Callable[[int], None] | None) -> tuple[int, int]:
    """Convert the examples; returns their number, and how many of them have negatives."""
    import pyarrow

    text = pyarrow.string()
    schema = pyarrow.schema([("query", text), ("positives", pyarrow.list_(text)), ("negatives", pyarrow.list_(text))])
    rows = with_negatives = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        for group in _grouped(examples):
            columns = zip(*((e.query, e.positives, e.negatives) for e in group), strict=True)
            arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            rows += len(group)
            with_negatives += sum(bool(example.negatives) for example in group)
            if progress is not None:
                progress(len(group))
    return rows, with_negatives


def _grouped(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Lists of at most BATCH_ROWS examples, closed early when their texts grow large."""
    group: list[Example] = []
    characters = 0
    for example in examples:
        group.append(example)
        characters += sum(map(len, (example.query, *example.positives, *example.negatives)))
        if len(group) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
