"""Streaming the rows of JSON lines, CSV, TSV and Parquet files, each with its file and line number."""

from __future__ import annotations

import contextlib
import csv
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from index.files import MAX_LINE, InputError, check_readable, parse_json

# Raised on reading when the bytes are not UTF-8, or when a compressed file is truncated or damaged.
UNREADABLE = (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error)
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")


@dataclass(frozen=True)
class Record:
    """One row: where it comes from ("corpus.jsonl:17", for error messages) and its columns."""

    place: str
    fields: dict[str, Any]


LazyRow = Callable[[], Record]
"""A function that parses the row when called, so that rows which are skipped are not parsed."""


def open_text(path: Path, newline: str | None = None, errors: str = "strict") -> IO[str]:
    """Open a UTF-8 text file for reading, decompressed if its name ends in .gz. A byte order mark is skipped.

    Raises:
        InputError: the file does not exist, or is a named pipe or device.
    """
    try:
        check_readable(path)
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline, errors=errors)
        return open(path, encoding="utf-8-sig", newline=newline, errors=errors)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None


def bounded_lines(stream: IO[str], path: Path) -> Iterator[str]:
    """Yield the lines of a stream, which may hold more than memory in one line.

    Raises:
        InputError: a line is longer than MAX_LINE characters.
    """
    for number, line in enumerate(iter(partial(stream.readline, MAX_LINE), ""), start=1):
        if len(line) == MAX_LINE and not line.endswith("\n"):
            raise InputError(f"{path}:{number}: expected lines of fewer than {MAX_LINE:,} characters")
        yield line


def read_lines(path: Path, errors: str = "strict") -> Iterator[str]:
    """Stream the lines of a UTF-8 text file (also .gz), without line ends.

    Raises:
        InputError: the file does not exist, or cannot be read as text.
    """
    with open_text(path, errors=errors) as stream:
        number = 0
        try:
            for line in bounded_lines(stream, path):
                number += 1
                yield line.rstrip("\n")
        except UNREADABLE as error:
            raise _unreadable(path, number, error) from None


def read_records(path: Path) -> Iterator[Record]:
    """Stream the rows of a .jsonl, .csv, .tsv (each also .gz) or .parquet file in constant memory.

    Raises:
        InputError: the file is missing, has another suffix, or is malformed; the message names the line.
    """
    return (row() for row in lazy_rows(path))


def lazy_rows(path: Path) -> Iterator[LazyRow]:
    """Like `read_records`, but each row is parsed only when it is called.

    Skipping a JSON row takes a fifteenth of the time of parsing it.

    Raises:
        InputError: as `read_records`; for a malformed JSON line, or a row with another number of columns than the
            header, when the row is called.
    """
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "jsonl":
        yield from _json_lines(path)
    elif kind in ("csv", "tsv"):
        yield from _separated(path, "," if kind == "csv" else "\t")
    elif kind == "parquet":
        yield from _parquet(path)
    else:
        raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")


def _json_lines(path: Path) -> Iterator[LazyRow]:
    # Bytes that are not UTF-8 become surrogates, so that the row with them is refused, and not the rest of the file.
    for number, line in enumerate(read_lines(path, errors="surrogateescape"), start=1):
        if line and not line.isspace():
            yield partial(_json_record, path, number, line)


def _json_record(path: Path, number: int, line: str) -> Record:
    place = f"{path}:{number}"
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{place}: expected UTF-8, found byte 0x{ord(line[error.start]) - 0xDC00:02x}") from None
    fields = parse_json(line, place)
    if not isinstance(fields, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(fields).__name__}")
    return Record(place, fields)


def _separated(path: Path, delimiter: str) -> Iterator[LazyRow]:
    # newline="" leaves line ends within quoted cells to the csv module.
    with open_text(path, newline="") as stream:
        # A cell may hold a long document; the default limit is 128 KiB.
        csv.field_size_limit(MAX_LINE)
        head: list[str] = []
        rows = csv.DictReader(_noting_first(bounded_lines(stream, path), head), delimiter=delimiter, strict=True)
        try:
            columns = list(rows.fieldnames or ())
            # If the header is quoted, the writer quotes every cell, or at least uses quotes as csv does.
            quoted = bool(head) and head[0].startswith('"')
            for column in columns:
                if columns.count(column) > 1:
                    raise InputError(f"{path}:1: expected columns of different names, found {column!r} twice")
            before = rows.line_num
            for fields in rows:
                place = f"{path}:{rows.line_num}"
                first, before = before + 1, rows.line_num
                if delimiter == "\t" and not quoted and _holds_rows(fields, len(columns)):
                    raise InputError(
                        f"{path}:{first}: expected a quote that closes in its row, found one that closes in line "
                        f'{rows.line_num}, after whole rows: if it belongs to the text, write "" for it and quotes '
                        f"around its cell; if the rows do, quote the names in the header too, or use .jsonl"
                    )
                if None in fields or None in fields.values():
                    found = len(fields.get(None) or ()) + sum(fields[column] is not None for column in columns)
                    yield partial(_refuse, f"{place}: expected {len(columns)} columns, found {found}")
                else:
                    yield partial(Record, place, dict(fields))
        except csv.Error as error:
            # The failing row begins after the last complete one.
            hint = ""
            if "expected after" in str(error):
                hint = '; a cell that begins with a quote ends at the next one: write "" for each quote of its text'
            raise InputError(f"{path}:{rows.line_num + 1}: expected a row of cells, found: {error}{hint}") from None
        except UNREADABLE as error:
            raise _unreadable(path, rows.line_num, error) from None


def _refuse(message: str) -> Record:
    raise InputError(message)


def _noting_first(lines: Iterable[str], first: list[str]) -> Iterator[str]:
    """Yield `lines`, and append the first of them to `first`."""
    for line in lines:
        if not first:
            first.append(line)
        yield line


def _holds_rows(fields: dict[str, Any], columns: int) -> bool:
    """Whether the lines within one row look like rows of the table: three or more lines, each with `columns` cells.

    This happens when the text of a cell merely begins with a quote, and a later cell ends with one: everything between
    is read as one row.
    """
    lines = "\t".join(cell for cell in fields.values() if isinstance(cell, str)).split("\n")
    return len(lines) > 2 and all(line.count("\t") == columns - 1 for line in lines)


def _unreadable(path: Path, lines_read: int, error: Exception) -> InputError:
    if not isinstance(error, UnicodeDecodeError):
        return InputError(f"{path}: cannot be read after line {lines_read}: {error}")
    # Text is decoded ahead of the lines: search for the line that contains the invalid byte.
    with (
        contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error),
        gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream,
    ):
        for number, line in enumerate(iter(partial(stream.readline, MAX_LINE), b""), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                return InputError(f"{path}:{number}: expected UTF-8, found byte 0x{line[wrong.start]:02x}")
    # The archive is damaged before the line ends.
    return InputError(f"{path}: expected UTF-8, found: {error}")


def _parquet(path: Path) -> Iterator[LazyRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        check_readable(path)
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=4096):
                for fields in batch.to_pylist():
                    number += 1
                    yield partial(Record, f"{path}: row {number}", fields)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def count_records(path: Path) -> int:
    """Approximate number of rows, for progress bars: the lines of a text file, the exact number of a Parquet file.

    Raises:
        InputError: the file is damaged, or it is a named pipe or device.
    """
    if path.exists():
        check_readable(path)
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from None
    lines = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            while block := stream.read(2**20):
                lines += block.count(b"\n")
    except UNREADABLE as error:
        raise _unreadable(path, lines, error) from None
    return lines
