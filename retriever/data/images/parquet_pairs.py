"""Pairs of Parquet files that contain the images, as bytes or as Hugging Face's structs of bytes and path."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from index.files import InputError, atomic_path, read_json, sha256_file, write_json
from index.image_files.folders import CAPTION_COLUMNS, IMAGE_COLUMNS, choose_column
from retriever.config.images import ImageSource
from retriever.data.images.pairs import RawPair, image_bytes, usable_captions

VERSION = 1
"""Version of the conversion. Files of other versions are not used."""
# Rows per record batch of the converted file, each with the bytes of an image.
BATCH_ROWS = 64


def contains_images(path: Path, column: str) -> bool:
    """Whether the image column of a Parquet file contains images; otherwise it contains paths.

    Args:
        path: The file.
        column: The column; empty: the first of IMAGE_COLUMNS.

    Raises:
        InputError: If the file cannot be read or lacks the column.
    """
    import pyarrow

    schema = _schema(path)
    field = schema.field(_checked_column(path, schema, column, IMAGE_COLUMNS)).type
    return bool(
        pyarrow.types.is_struct(field) or pyarrow.types.is_binary(field) or pyarrow.types.is_large_binary(field)
    )


class ParquetPairs:
    """The pairs of Parquet files, copied once to memory-mapped Arrow files. Picklable."""

    def __init__(self, source: ImageSource, tables: Sequence[Path], folders: Sequence[Path]) -> None:
        """Open converted files.

        Args:
            source: The source.
            tables: The converted files.
            folders: Folder of the Parquet file of each, which paths of images are relative to.
        """
        import pyarrow

        self.source, self._tables, self._folders = source, list(tables), list(folders)
        self.name, self.notices, self.skipped = source.path, list[str](), 0
        about = [read_json(table.with_suffix(".json")) for table in tables]
        self.sha256 = hashlib.sha256(json.dumps([part["sha256"] for part in about]).encode()).hexdigest()
        self._names = [Path(part["path"]).name for part in about]
        self._files = [pyarrow.ipc.open_file(pyarrow.memory_map(str(table))) for table in tables]
        # First row of each file, and first row of each record batch within its file.
        self._starts = list(accumulate((part["batches"][-1] for part in about), initial=0))
        self._batches = [part["batches"] for part in about]

    @classmethod
    def open(
        cls, source: ImageSource, files: Sequence[Path], cache: Path, progress: Callable[[int], None] | None
    ) -> ParquetPairs:
        """Open Parquet files, converted to memory-mapped files in `cache` unless these exist.

        Raises:
            InputError: If a file cannot be read, lacks a column, or has no row.
        """
        tables = [_converted(source, file, cache / "parquet", progress) for file in files]
        pairs = cls(source, tables, [file.resolve().parent for file in files])
        if not len(pairs):
            raise InputError(f"{source.path}: expected at least one row, found none")
        return pairs

    def __len__(self) -> int:
        return self._starts[-1]

    def location(self, row: int) -> str:
        """Return the file and the number of a row, from 1."""
        number = self._file_of(row)
        return f"{self._names[number]}: row {row - self._starts[number] + 1}"

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row."""
        number = self._file_of(row)
        within = int(row) - self._starts[number]
        batch = bisect_right(self._batches[number], within) - 1
        records, offset = self._files[number].get_batch(batch), within - self._batches[number][batch]
        captions = records.column(1)[offset].as_py()
        image = records.column(0)[offset].as_py() if with_image else None
        content = image_bytes(image, self, row, self._folders[number]) if with_image else b""
        return RawPair(content, usable_captions(captions, self, row), f"{self.sha256} {row}", self, row)

    def images_sha256(self) -> str:
        """Return the sha256 of the files."""
        return self.sha256

    def _file_of(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return bisect_right(self._starts, row) - 1

    def __reduce__(self) -> tuple[type[ParquetPairs], tuple[Any, ...]]:
        return ParquetPairs, (self.source, self._tables, self._folders)


def _converted(source: ImageSource, file: Path, cache: Path, progress: Callable[[int], None] | None) -> Path:
    """Return the converted file of a Parquet file, which is written if necessary."""
    import pyarrow

    schema = _schema(file)
    image = _checked_column(file, schema, source.image, IMAGE_COLUMNS)
    captions = [_checked_column(file, schema, name, CAPTION_COLUMNS) for name in source.caption or ("",)]
    stat = file.stat()
    identity = [VERSION, str(file.resolve()), stat.st_size, stat.st_mtime_ns, image, captions]
    path = cache / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.arrow"
    if path.exists() and path.with_suffix(".json").exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    target = pyarrow.schema([("image", schema.field(image).type), ("captions", pyarrow.list_(pyarrow.string()))])
    starts = [0]
    with atomic_path(path) as temporary:
        with pyarrow.OSFile(str(temporary), "wb") as out, pyarrow.ipc.new_file(out, target) as writer:
            for images, cells in _batches(file, image, captions):
                texts = [_texts(file, starts[-1] + row, captions, row_cells) for row, row_cells in enumerate(cells)]
                columns = [images, pyarrow.array(texts, target.field(1).type)]
                writer.write_batch(pyarrow.record_batch(columns, schema=target))
                starts.append(starts[-1] + len(texts))
                if progress is not None:
                    progress(len(texts))
        checksum = sha256_file(temporary)
    write_json(path.with_suffix(".json"), {"path": str(file.resolve()), "batches": starts, "sha256": checksum})
    return path


def _batches(file: Path, image: str, captions: Sequence[str]) -> Iterator[tuple[Any, list[tuple[Any, ...]]]]:
    """Yield the images and the cells with captions of BATCH_ROWS rows at a time; the last batch may be smaller."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = list(dict.fromkeys([image, *captions]))
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield (
                    batch.column(image),
                    list(zip(*(batch.column(name).to_pylist() for name in captions), strict=True)),
                )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _texts(file: Path, row: int, columns: Sequence[str], cells: Sequence[Any]) -> list[str]:
    texts: list[str] = []
    for column, cell in zip(columns, cells, strict=True):
        for value in cell if isinstance(cell, list) else [cell]:
            if value is not None and not isinstance(value, str):
                raise InputError(
                    f"{file}: row {row + 1}: expected text or a list of texts in column '{column}', found {value!r:.40}"
                )
            texts += [] if value is None else [value]
    return texts


def _schema(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _checked_column(path: Path, schema: Any, name: str, candidates: Sequence[str]) -> str:
    return choose_column(str(path), schema.names, [name] if name else candidates)
