"""Examples on disk: every source is converted once to a memory-mapped Arrow file, which is read by row."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from index.files import MAX_LINE, InputError, atomic_path, parse_json, read_at, read_json, sha256_file, write_json
from index.records import Record
from retriever.config.sources import SourceConfig
from retriever.data.early_conversion import taken
from retriever.data.sources import Example, Notices, parse_example, read_examples, resolve_format, source_files

VERSION = 4
"""Version of the conversion. Files of other versions are not used."""
BATCH_ROWS = 4096
BATCH_CHARACTERS = 2**24


class ExampleTable:
    """The examples of one source in a memory-mapped file. Picklable; workers open the file themselves.

    Attributes:
        name: Path of the source, for messages.
        notices: One line for each kind of row or text that was skipped or corrected.
        sha256: Checksum of the converted rows; it does not depend on the location of the files.
        rows_with_negatives: Number of rows with a hard negative.
        rows_with_scores: Number of rows with a teacher's scores.
        rows_skipped: Number of rows of the source that were skipped because the query or the positive is empty.
    """

    name: str
    notices: list[str]
    sha256: str
    rows_with_negatives: int
    rows_with_scores: int
    rows_skipped: int

    def __init__(self, path: Path) -> None:
        """Open a converted file.

        Raises:
            InputError: If the file is missing or damaged.
        """
        import pyarrow

        self.path = path
        metadata = read_json(path.with_suffix(".json"))
        try:
            self.name, self.notices = metadata["source"]["path"], metadata["notices"]
            self.sha256, self.rows_with_negatives = metadata["sha256"], metadata["rows_with_negatives"]
            self.rows_with_scores, self.rows_skipped = metadata["rows_with_scores"], metadata["rows_skipped"]
        except (LookupError, TypeError):
            raise InputError(f"{path.with_suffix('.json')}: damaged; remove it to convert the source again") from None
        try:
            rows = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: cannot be read (remove it to convert {self.name} again): {error}") from None
        self._size = rows.num_rows
        self._columns = [rows.column(field.name) for field in fields(Example)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> Example:
        """Return the example of a row, 0 <= row < len(self)."""
        if not 0 <= row < self._size:
            raise IndexError(f"row {row} of {self._size}")
        query, positives, negatives, scores, *prompts = (column[int(row)].as_py() for column in self._columns)
        return Example(query, tuple(positives), tuple(negatives), None if scores is None else tuple(scores), *prompts)

    def prompts(self) -> tuple[list[str], list[str]]:
        """Return the distinct prompts of the rows' queries and of their passages, sorted."""
        from pyarrow import compute

        query, passage = (
            sorted(prompt for prompt in compute.unique(column).to_pylist() if prompt is not None)
            for column in self._columns[4:]
        )
        return query, passage

    def texts(self, batch_rows: int) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Yield queries and their lists of positives in order, for at most `batch_rows` rows at a time."""
        queries, positives = self._columns[:2]
        for start in range(0, self._size, batch_rows):
            yield queries.slice(start, batch_rows).to_pylist(), positives.slice(start, batch_rows).to_pylist()

    def __reduce__(self) -> tuple[type[ExampleTable], tuple[Path]]:
        return ExampleTable, (self.path,)


class LineTable(ExampleTable):
    """The examples of a .jsonl file, read from the file when they are asked for. Picklable."""

    def __init__(self, path: Path) -> None:
        """Open the positions of the rows that `open_source` wrote.

        Raises:
            InputError: If they are missing or damaged, or if the file has changed.
        """
        self.path = path
        metadata = read_json(path.with_suffix(".json"))
        columns = {name: metadata["source"][name] for name in _COLUMNS}
        self._config = SourceConfig(**columns)
        self.name, self.notices = self._config.path, metadata["notices"]
        self.sha256, self.rows_with_negatives = metadata["sha256"], metadata["rows_with_negatives"]
        self.rows_with_scores, self.rows_skipped = metadata["rows_with_scores"], metadata["rows_skipped"]
        self._prompts = metadata["prompts"]
        try:
            self._spans = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: cannot be read (remove it to make it again): {error}") from None
        self._size = len(self._spans)
        self._file = open(self.name, "rb")  # noqa: SIM115 - open as long as the table
        state, expected = os.fstat(self._file.fileno()), metadata["files"][0]
        if (state.st_size, state.st_mtime_ns) != (expected["bytes"], expected["mtime_ns"]):
            raise InputError(f"{self.name}: changed since the run began")

    def __getitem__(self, row: int) -> Example:
        """Return the example of a row, 0 <= row < len(self)."""
        if not 0 <= row < self._size:
            raise IndexError(f"row {row} of {self._size}")
        start, end = self._spans[row].tolist()
        # Forked workers share the position of the file, which this does not use.
        line = read_at(self._file.fileno(), end - start, start)
        example = parse_example(self._config, line_record(line, f"{self.name}: byte {start}"), Notices())
        if example is None:
            raise InputError(f"{self.name}: byte {start}: expected a row, found none: it changed since the run began")
        return example

    def prompts(self) -> tuple[list[str], list[str]]:
        """Return the distinct prompts of the rows' queries and of their passages, sorted."""
        query, passage = self._prompts
        return query, passage

    def texts(self, batch_rows: int) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Yield queries and their lists of positives in order, for at most `batch_rows` rows at a time."""
        for start in range(0, self._size, batch_rows):
            rows = [self[row] for row in range(start, min(self._size, start + batch_rows))]
            yield [row.query for row in rows], [list(row.positives) for row in rows]

    def __reduce__(self) -> tuple[type[ExampleTable], tuple[Path]]:
        return LineTable, (self.path,)


# Fields of a source that its rows depend on.
_COLUMNS = ("path", "query", "positive", "negatives", "scores", "query_prompt_column", "passage_prompt_column")


def line_record(line: bytes, place: str) -> Record:
    """Parse a line of JSON.

    Raises:
        InputError: The line is not a JSON object.
    """
    try:
        fields_ = parse_json(line.decode(), place)
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: expected UTF-8, found: {error}") from None
    if not isinstance(fields_, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(fields_).__name__}")
    return Record(place, fields_)


def _open_lines(config: SourceConfig, cache: Path, progress: Callable[[int], None] | None) -> LineTable:
    """Find the rows of a .jsonl file, unless their positions are in the cache."""
    if resolve_format(config) != "jsonl" or config.path.endswith(".gz"):
        raise InputError(f"{config.path}: expected a .jsonl file with copy false")
    identity = _identity(config)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    path = cache / f"{key}.npy"
    if not (path.exists() and path.with_suffix(".json").exists()):
        notices, spans, digest = Notices(), array("q"), hashlib.sha256()
        prompts: tuple[set[str], set[str]] = (set(), set())
        with_negatives = with_scores = offset = 0
        with open(config.path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE), b""), start=1):
                digest.update(line)
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    raise InputError(f"{config.path}:{number}: expected lines of fewer than {MAX_LINE:,} bytes")
                start = offset + (3 if number == 1 and line.startswith(codecs.BOM_UTF8) else 0)
                offset += len(line)
                if not (content := line[len(line) - offset + start :]).strip():
                    continue
                example = parse_example(config, line_record(content, f"{config.path}:{number}"), notices)
                if example is None:
                    continue
                spans.extend((start, offset))
                with_negatives += bool(example.negatives)
                with_scores += example.scores is not None
                for own, prompt in zip(prompts, (example.query_prompt, example.passage_prompt), strict=True):
                    own.update([] if prompt is None else [prompt])
                if progress is not None:
                    progress(1)
        if not spans:
            raise InputError("; ".join([f"{config.path}: expected at least one example, found none", *notices.lines()]))
        if not with_negatives and config.negatives != SourceConfig.negatives:
            raise InputError(f"{config.path}: expected hard negatives in '{config.negatives}', found none in any row")
        if not with_scores and config.scores not in ("", SourceConfig.scores):
            raise InputError(f"{config.path}: expected scores in '{config.scores}', found none in any row")
        if _identity(config) != identity:
            raise InputError(f"{config.path}: changed while it was read")
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.frombuffer(spans, np.int64).reshape(-1, 2))
        digest.update(json.dumps([identity["source"][name] for name in _COLUMNS[1:]]).encode())
        result = {
            "rows": len(spans) // 2,
            "rows_with_negatives": with_negatives,
            "rows_with_scores": with_scores,
            "rows_skipped": notices.count("rows skipped"),
            "sha256": digest.hexdigest(),
            "prompts": [sorted(own) for own in prompts],
            "notices": notices.lines(),
        }
        write_json(path.with_suffix(".json"), {**identity, **result})
    return LineTable(path)


def open_source(config: SourceConfig, cache: Path, *, progress: Callable[[int], None] | None = None) -> ExampleTable:
    """Open the examples of a source; convert them first unless the result is in the folder `cache`.

    With `copy` false in the source, only the positions of its rows are written.

    The conversion takes constant memory. A result in the cache is used if the path, columns and split of the source and
    the sizes and modification times of its files are the same. A dataset of the Hugging Face hub is therefore not read
    again unless the revision changes. Several processes may convert the same source at the same time.

    Args:
        config: The source.
        cache: Folder of converted sources.
        progress: Called with the number of rows converted since the last call.

    Raises:
        InputError: If the source is missing, broken or empty; the message names the file and line.
    """
    if not config.copy:
        return _open_lines(config, cache, progress)
    identity = _identity(config)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    path = cache / f"{key}.arrow"
    # The JSON file is written last; if it exists, the rows are complete.
    if not (path.exists() and path.with_suffix(".json").exists()) and not taken(key, cache, progress):
        notices = Notices()
        with atomic_path(path) as temporary:
            rows, with_negatives, with_scores = _write_rows(temporary, read_examples(config, notices), progress)
            if rows == 0:
                raise InputError(
                    "; ".join([f"{config.path}: expected at least one example, found none", *notices.lines()])
                )
            if _identity(config) != identity:
                raise InputError(f"{config.path}: changed while it was read")
            checksum = sha256_file(temporary)
        result = {
            "rows": rows,
            "rows_with_negatives": with_negatives,
            "rows_with_scores": with_scores,
            "rows_skipped": notices.count("rows skipped"),
            "sha256": checksum,
            "notices": notices.lines(),
        }
        write_json(path.with_suffix(".json"), {**identity, **result})
    return ExampleTable(path)


def _identity(config: SourceConfig) -> dict[str, Any]:
    """Return everything that the result of a conversion depends on."""
    settings = {
        name: value
        for name, value in asdict(config).items()
        if name not in ("weight", "query_prompt", "passage_prompt", "loss")
    }
    files = [
        {"path": str(file.resolve()), "bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}
        for file in source_files(config)
    ]
    return {"version": VERSION, "source": {**settings, "format": resolve_format(config)}, "files": files}


def _write_rows(
    path: Path, examples: Iterable[Example], progress: Callable[[int], None] | None
) -> tuple[int, int, int]:
    """Write the examples as an Arrow file; returns the numbers of rows, of rows with negatives and with scores."""
    import pyarrow

    text = pyarrow.string()
    texts, numbers = pyarrow.list_(text), pyarrow.list_(pyarrow.float32())
    types = (text, texts, texts, numbers, text, text)
    schema = pyarrow.schema([(field.name, type_) for field, type_ in zip(fields(Example), types, strict=True)])
    rows = with_negatives = with_scores = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        for batch in _batches(examples):
            columns = zip(*map(attrgetter(*schema.names), batch), strict=True)
            arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            rows += len(batch)
            with_negatives += sum(bool(example.negatives) for example in batch)
            with_scores += sum(example.scores is not None for example in batch)
            if progress is not None:
                progress(len(batch))
    return rows, with_negatives, with_scores


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Yield lists of at most BATCH_ROWS examples, fewer if their texts reach BATCH_CHARACTERS."""
    batch: list[Example] = []
    characters = 0
    for example in examples:
        batch.append(example)
        characters += sum(map(len, (example.query, *example.positives, *example.negatives)))
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
