"""Pairs of a Hugging Face dataset with an image column."""

from __future__ import annotations

import hashlib
import json

from index.files import InputError
from index.image_files.folders import CAPTION_COLUMNS, IMAGE_COLUMNS, choose_column
from retriever.config.images import ImageSource
from retriever.data.images.pairs import RawPair, image_bytes, usable_captions
from retriever.data.sources import load_huggingface


class HuggingFacePairs:
    """The pairs of a Hugging Face dataset with an image column. Hub datasets are downloaded first."""

    def __init__(self, source: ImageSource) -> None:
        """Open the dataset.

        Raises:
            InputError: If the dataset cannot be read or lacks a column.
        """
        self.source, self.name = source, source.path
        self.notices: list[str] = []
        self.skipped = 0
        self._dataset = load_huggingface(source.path, source.split, streaming=False)
        names = self._dataset.column_names
        self.image = source.image or choose_column(source.path, names, IMAGE_COLUMNS)
        self.captions = source.caption or (choose_column(source.path, names, CAPTION_COLUMNS),)
        for column in (self.image, *self.captions):
            if column not in names:
                raise InputError(f"{source.path}: expected a column '{column}', found {', '.join(names)}")
        import datasets

        self._dataset = self._dataset.select_columns([self.image, *self.captions]).cast_column(
            self.image, datasets.Image(decode=False)
        )
        identity = [self._dataset._fingerprint, len(self._dataset), self.image, self.captions]
        self.sha256 = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def location(self, row: int) -> str:
        """Return the dataset and the number of a row."""
        return f"{self.name}: row {row}"

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row."""
        cells = self._dataset[int(row)]
        content = image_bytes(cells[self.image], self, row) if with_image else b""
        captions = [cells[column] for column in self.captions]
        texts = [text for cell in captions for text in (cell if isinstance(cell, list) else [cell])]
        return RawPair(content, usable_captions(texts, self, row), f"{self.sha256} {row}", self, row)

    def images_sha256(self) -> str:
        """Return the sha256 of the dataset."""
        return self.sha256
