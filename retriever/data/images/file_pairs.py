"""Pairs of a table with image paths."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from index.files import InputError
from index.image_files.folders import CAPTION_COLUMNS, IMAGE_COLUMNS, choose_column
from index.records import read_records
from retriever.config.images import ImageSource
from retriever.config.sources import SourceConfig
from retriever.data.images.pairs import RawPair, read_file, usable_captions
from retriever.data.table import ExampleTable, open_source


class FilePairs:
    """The pairs of a table with a column of image paths and a column of captions."""

    def __init__(self, table: ExampleTable, folder: Path) -> None:
        self.table, self.folder = table, folder
        self.name, self.notices, self.sha256 = table.name, table.notices, table.sha256
        self.skipped = table.rows_skipped

    @classmethod
    def open(cls, source: ImageSource, cache: Path, progress: Callable[[int], None] | None) -> FilePairs:
        """Open a table, converted to a memory-mapped one in `cache`. Paths are relative to the table's folder.

        Raises:
            InputError: If the table cannot be read, lacks a column, or names URLs instead of files.
        """
        if len(source.caption) > 1:
            raise InputError(
                f"{source.path}: caption: expected one column (its cells may be lists), found {source.caption}"
            )
        first = next(read_records(Path(source.path)), None)
        columns = [] if first is None else list(first.fields)
        place = source.path if first is None else first.place
        image = source.image or choose_column(place, columns, IMAGE_COLUMNS)
        caption = source.caption[0] if source.caption else choose_column(place, columns, CAPTION_COLUMNS)
        if first is not None and "://" in str(first.fields.get(image, "")):
            raise InputError(f"{place}: expected the path of an image file in column '{image}', found a URL")
        table = open_source(SourceConfig(path=source.path, query=image, positive=caption), cache, progress=progress)
        return cls(table, Path(source.path).resolve().parent)

    def __len__(self) -> int:
        return len(self.table)

    def location(self, row: int) -> str:
        """Return the path of the image."""
        return str(self.folder / self.table[row].query)

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row."""
        example = self.table[row]
        content = read_file(self.folder / example.query) if with_image else b""
        return RawPair(content, usable_captions(example.positives, self, row), example.query, self, row)

    def images_sha256(self) -> str:
        """Return a sha256 of the table and of the size and modification time of every image file."""
        digest = hashlib.sha256(self.sha256.encode())
        for row in range(len(self)):
            try:
                stat = os.stat(self.folder / self.table[row].query)
            except (OSError, ValueError):
                digest.update(b"none\n")
            else:
                digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()
