"""Tables with a column of images: Parquet files, and datasets saved by Hugging Face datasets."""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from index.files import InputError, read_json
from index.image_files.folders import read_image_file
from index.records import Record


@dataclass(frozen=True, slots=True)
class ImageCell:
    """An image within a table."""

    table: ImageTable
    column: str
    row: int

    @property
    def name(self) -> str:
        """File and number of the row, from 1."""
        return self.table.place(self.row)

    def read(self) -> bytes:
        """Read the bytes of the image; empty bytes if the cell has none.

        Raises:
            InputError: the file that the cell names cannot be read.
        """
        cell: Any = self.table.cell(self.column, self.row)
        path: Any = None
        if isinstance(cell, dict):
            cell, path = cell.get("bytes"), cell.get("path")
        if isinstance(cell, bytes) and cell:
            return cell
        if not path:
            return b""
        try:
            return read_image_file(self.table.folder / path)
        except (OSError, ValueError) as error:
            # ValueError: the name contains a NUL.
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.name}: {path!r:.200} cannot be read: {reason}") from None


class ImageTable:
    """Arrow data with a column of images: Parquet files, or the files that `Dataset.save_to_disk` writes.

    Attributes:
        columns: Names of the columns.
        class_names: Column -> names of its numbers, for columns with Hugging Face's feature ClassLabel.
        folder: Folder that paths of images are relative to.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Open files of equal columns.

        Raises:
            InputError: A file cannot be read.
        """
        import pyarrow
        import pyarrow.parquet

        self._files = list(files)
        self.folder = self._files[0].parent
        self._parts: list[Any] = []
        # Number of rows of each file, or of each row group of a Parquet file.
        self._groups: list[tuple[int, int]] = []
        counts: list[int] = []
        try:
            for number, file in enumerate(self._files):
                if file.suffix == ".parquet":
                    part = pyarrow.parquet.ParquetFile(file)
                    sizes = [part.metadata.row_group(group).num_rows for group in range(part.num_row_groups)]
                else:
                    part = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
                    sizes = [part.num_rows]
                self._parts.append(part)
                self._groups += [(number, group) for group in range(len(sizes))]
                counts += sizes
        except FileNotFoundError:
            raise InputError(f"{file}: no such file") from None
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None
        self._starts = list(accumulate(counts, initial=0))
        self._first_rows = [0] * len(self._files)
        for start, (number, group) in zip(self._starts, self._groups, strict=False):
            if group == 0:
                self._first_rows[number] = start
        schema = getattr(self._parts[0], "schema_arrow", None) or self._parts[0].schema
        self.columns = list(schema.names)
        self._images = {field.name for field in schema if _may_be_image(field.type)}
        self.class_names = _class_names(schema)
        self._cached: tuple[int, str, Any] = (-1, "", None)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, split: str | None) -> ImageTable | None:
        """Open a Parquet file, or a folder of Parquet files or of a saved dataset; None if it is none of these.

        Args:
            path: The file or folder.
            split: Split of a folder: part of the names of Parquet files, such as test-00000-of-00001.parquet, or folder
                of a saved DatasetDict. None: all Parquet files.

        Raises:
            InputError: A file cannot be read, or the split is missing.
        """
        if path.is_file():
            return cls([path]) if path.suffix == ".parquet" else None
        if not path.is_dir():
            return None
        if (path / "dataset_dict.json").is_file():
            splits = read_json(path / "dataset_dict.json").get("splits", [])
            if split is None or split not in splits:
                wanted = f"a split {split!r}" if split else "the folder of one split"
                raise InputError(f"{path}: expected {wanted}, found {', '.join(splits)}")
            path = path / split
        if (path / "state.json").is_file():
            names = [part["filename"] for part in read_json(path / "state.json")["_data_files"]]
            return cls([path / Path(name).name for name in names])
        files = sorted({*path.glob("*.parquet"), *path.glob("data/*.parquet"), *path.glob(f"{split or '*'}/*.parquet")})
        if not files or split is None:
            return cls(files) if files else None
        own = [file for file in files if file.parent.name == split or file.name.split("-")[0].split(".")[0] == split]
        if not own:
            raise InputError(f"{path}: expected Parquet files of the split {split!r}, found {files[0].name}")
        return cls(own)

    def __len__(self) -> int:
        return self._starts[-1]

    def has_images(self, column: str) -> bool:
        """Whether a column contains images; otherwise its texts may be paths."""
        return column in self._images

    def place(self, row: int) -> str:
        """File and number of a row, from 1, for messages."""
        number = self._groups[self._locate(row)[0]][0]
        return f"{self._files[number].name}: row {row - self._first_rows[number] + 1}"

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        """Yield the rows in order, with some columns."""
        for index, (number, group) in enumerate(self._groups):
            part = self._parts[number]
            table = part.read_row_group(group, columns=list(columns)) if hasattr(part, "read_row_group") else part
            cells = [table.column(name).to_pylist() for name in columns]
            for within in range(table.num_rows):
                row = self._starts[index] + within
                yield Record(self.place(row), {name: own[within] for name, own in zip(columns, cells, strict=True)})

    def cell(self, column: str, row: int) -> Any:
        """Read a cell. The column of the last row group is kept in memory, so that rows should be read in order."""
        index, within = self._locate(row)
        number, group = self._groups[index]
        part = self._parts[number]
        if not hasattr(part, "read_row_group"):
            return part.column(column)[within].as_py()
        with self._lock:
            if self._cached[:2] != (index, column):
                self._cached = (index, column, part.read_row_group(group, columns=[column]).column(column))
            return self._cached[2][within].as_py()

    def _locate(self, row: int) -> tuple[int, int]:
        """The number of the row group with a row, counted over all files, and the row's position in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        index = bisect_right(self._starts, row) - 1
        return index, row - self._starts[index]


def _may_be_image(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    if types.is_struct(kind):
        return any(field.name in ("bytes", "path") for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _class_names(schema: Any) -> dict[str, list[str]]:
    metadata = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(metadata)["info"]["features"] if metadata else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    found = {}
    for column, feature in features.items():
        if isinstance(feature, list):
            feature = feature[0] if feature else None
        elif isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
            feature = feature.get("feature")
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            if isinstance(names, list) and names:
                found[column] = [str(name) for name in names]
    return found
