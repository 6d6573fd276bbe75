"""The fields of all passages of an index as columns in a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from index.fields.values import KEY
from index.files import InputError, parse_json

if TYPE_CHECKING:
    import pyarrow

# Rows of a row group of the file.
GROUP_ROWS = 65536
KINDS = ("text", "integer", "number", "boolean", "texts")


def write_columns(passages: Path, path: Path) -> bool:
    """Write the fields of `passages` (JSON lines of an index) as columns; no file if no passage has fields.

    Args:
        passages: the passages.
        path: the Parquet file to write.

    Returns:
        Whether the file was written.

    Raises:
        InputError: a field has values of different types.
    """
    kinds: dict[str, str] = {}
    for number, fields in enumerate(_fields_of(passages), start=1):
        for name, value in fields.items():
            kinds[name] = _joined(kinds.get(name), _kind(value), name, f"{passages}:{number}")
    if not kinds:
        return False
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, _type(kind)) for name, kind in kinds.items()])
    rows = _fields_of(passages)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, GROUP_ROWS)):
            arrays = [
                pyarrow.array([_converted(fields.get(name), kind) for fields in group], _type(kind))
                for name, kind in kinds.items()
            ]
            writer.write_table(pyarrow.table(arrays, schema))
    return True


class Columns:
    """The columns of a file that `write_columns` wrote; each is read when it is first asked for.

    Args:
        path: the file.
        rows: number of rows that it must have.

    Raises:
        InputError: the file cannot be read, or has another number of rows.
    """

    def __init__(self, path: Path, rows: int) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = path
        self._read: dict[str, pyarrow.ChunkedArray] = {}
        try:
            # Opened once: the file may be replaced by that of a changed index.
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]:.200}") from None
        if self._file.metadata.num_rows != rows:
            raise InputError(f"{path}: expected {rows} rows, found {self._file.metadata.num_rows}")

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Name of each column -> its kind: text, integer, number, boolean or texts."""
        import pyarrow

        by_type = {_type(kind): kind for kind in KINDS}
        # Parquet gives the elements of lists another name.
        texts = (_type("texts"), pyarrow.list_(pyarrow.field("element", pyarrow.string())))
        return {
            field.name: "texts" if field.type in texts else by_type.get(field.type, str(field.type))
            for field in self._file.schema_arrow
        }

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """The values of a column.

        Raises:
            InputError: there is no such column, or it is damaged.
        """
        import pyarrow

        if name not in self.kinds:
            raise InputError(f"expected one of {', '.join(self.kinds) or 'none'}, found {name!r:.60}")
        if name not in self._read:
            try:
                self._read[name] = self._file.read(columns=[name]).column(0)
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(f"{self._path}: damaged: {str(error).splitlines()[0]:.200}") from None
        return self._read[name]

    def values(self, name: str, limit: int) -> list[Any]:
        """The most frequent values of a text or boolean column, at most `limit`; empty for other columns."""
        import pyarrow.compute

        if self.kinds[name] not in ("text", "boolean"):
            return []
        counted = pyarrow.compute.value_counts(self.column(name).combine_chunks()).to_pylist()
        counted = sorted((-each["counts"], str(each["values"]), each["values"]) for each in counted)
        return [value for _, _, value in counted[: limit + 1] if value is not None][:limit]


def check_kinds(fields: Mapping[str, object], kinds: Mapping[str, str], place: str) -> None:
    """Check that fields could be rows of columns of these kinds.

    Raises:
        InputError: a value has another type; the message begins with `place`.
    """
    for name, value in fields.items():
        _joined(kinds.get(name), _kind(value), name, place)


def texts_parent_rows(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, Any]:
    """The row [n] int64 of each text of a column of lists, and the texts [n]."""
    import pyarrow.compute

    combined = column.combine_chunks()
    return pyarrow.compute.list_parent_indices(combined).to_numpy(), pyarrow.compute.list_flatten(combined)


def _fields_of(passages: Path) -> Iterator[dict[str, Any]]:
    marker = f'"{KEY}": {{'.encode()
    with open(passages, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            # Lines without fields are not parsed. A text cannot contain the marker: its quotes are escaped.
            row = parse_json(line.decode("utf-8", "replace"), f"{passages}:{number}") if marker in line else None
            fields = row.get(KEY) if isinstance(row, dict) else None
            yield fields if isinstance(fields, dict) else {}


def _kind(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "texts" if isinstance(value, list) else "text"


def _joined(known: str | None, new: str | None, name: str, place: str) -> str:
    """The kind of a column that has values of both kinds."""
    if known is None or new is None or known == new:
        return known or new or ""
    if {known, new} == {"integer", "number"}:
        return "number"
    if known == "":
        return new
    raise InputError(f"{place}: field {name!r:.60}: expected values of one type, found {new} after {known}")


def _type(kind: str) -> Any:
    import pyarrow

    types = {
        "integer": pyarrow.int64(),
        "number": pyarrow.float64(),
        "boolean": pyarrow.bool_(),
        "texts": pyarrow.list_(pyarrow.string()),
    }
    return types.get(kind, pyarrow.string())


def _converted(value: Any, kind: str) -> Any:
    return float(value) if kind == "number" and value is not None else value
