"""Rows of text files, one at a time: JSON lines, CSV, TSV and Parquet, each with the line it came from."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from index.files import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")


@dataclass(frozen=True)
class Record:
    """One row: its place for error messages ("corpus.jsonl:17"), and its columns."""

    place: str
    fields: dict[str, Any]


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """Open a UTF-8 text file for reading, through gzip when its name ends in .gz.

    Raises:
        InputError: there is no such file.
    """
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8", newline=newline)
        return open(path, encoding="utf-8", newline=newline)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such file") from None


def read_records(path: Path) -> Iterator[Record]:
    """Stream the rows of a .jsonl, .csv, .tsv (each also .gz) or .parquet file in constant memory.

    Raises:
        InputError: the file is missing, of another kind, or broken; the message names the line.
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


def _json_lines(path: Path) -> Iterator[Record]:
    with open_text(path) as stream:
        number = 0
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise InputError(f"{path}:{number}: expected a JSON object, found {type(fields).__name__}")
                yield Record(f"{path}:{number}", fields)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: expected JSON, found: {error}") from None
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}:{number + 1}: cannot be read: {error}") from None


def _separated(path: Path, delimiter: str) -> Iterator[Record]:
    # newline="" leaves line ends inside quoted cells to the csv module.
    with open_text(path, newline="") as stream:
        # A cell may hold a whole document; the module's own limit is 128 KiB.
        csv.field_size_limit(2**31 - 1)
        rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            for fields in rows:
                place = f"{path}:{rows.line_num}"
                if None in fields or None in fields.values():
                    found = len(fields.get(None) or ()) + sum(value is not None for value in fields.values())
                    found -= None in fields
                    raise InputError(f"{place}: expected {len(rows.fieldnames or ())} columns, found {found}")
                yield Record(place, dict(fields))
        except csv.Error as error:
            raise InputError(f"{path}:{rows.line_num}: {error}") from None
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}:{rows.line_num + 1}: cannot be read: {error}") from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=4096):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}: row {number}", fields)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
