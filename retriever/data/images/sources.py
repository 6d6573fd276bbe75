"""Pairs of an image and its captions by row: from tars, from tables with image paths, from Hugging Face datasets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from index.files import InputError, parse_json
from index.image_files import read_image_file
from retriever.config.images import ImageSource
from retriever.config.sources import SourceConfig
from retriever.data.images.tars import ShardedSamples, index_shards
from retriever.data.sources import load_huggingface
from retriever.data.table import ExampleTable, open_source
from retriever.models.images.transforms import open_image


@dataclass(frozen=True)
class RawPair:
    """An encoded image with its captions."""

    image: bytes
    captions: tuple[str, ...]
    """At least one; none is empty."""
    key: str
    """Equal for rows with the same image."""
    location: str
    """File and position, for messages."""

    def open(self) -> Image.Image:
        """Decode the image.

        Raises:
            BrokenPairError: If the file is damaged, not an image, or too large.
        """
        try:
            return open_image(self.image, self.location)
        except InputError as error:
            raise BrokenPairError(str(error)) from None


class BrokenPairError(InputError):
    """A single pair cannot be used."""


class PairSource(Protocol):
    """The pairs of one source. Picklable."""

    name: str
    """Path of the source, for messages."""
    notices: list[str]
    """One line for each kind of pair that was skipped when the source was opened."""
    skipped: int
    """Number of pairs that were skipped when the source was opened, because the image or the caption is missing."""
    sha256: str
    """Identifies the pairs."""

    def __len__(self) -> int: ...

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row; `image` is empty unless `with_image`.

        Raises:
            BrokenPairError: If the image or the caption is missing.
        """

    def images_sha256(self) -> str:
        """Return a sha256 that identifies the images, for cached features."""


def open_pairs(
    source: ImageSource, cache: Path, *, workers: int = 0, progress: Callable[[int], None] | None = None
) -> PairSource:
    """Open a source of pairs.

    Args:
        source: The source.
        cache: Folder for indexes of tars and converted tables.
        workers: Number of processes that index tars. Default: 0, the calling process.
        progress: Called with the number of tars or rows done since the last call.

    Raises:
        InputError: If the source is missing, broken or empty, lacks a column, or more than `source.max_broken` of its
            pairs cannot be used.
    """
    format_ = source.format if source.format != "auto" else _detect_format(source.path)
    pairs: PairSource
    if format_ == "webdataset":
        pairs = TarPairs(source, index_shards(source.path, cache / "tars", workers=workers, progress=progress))
    elif format_ == "files":
        pairs = FilePairs.open(source, cache, progress)
    else:
        pairs = HuggingFacePairs(source)
    check_broken(source.path, pairs.skipped, pairs.skipped + len(pairs), source.max_broken, "; ".join(pairs.notices))
    return pairs


def check_broken(name: str, broken: int, pairs: int, max_broken: float, detail: str) -> None:
    """Check the number of pairs that cannot be used. Up to 100 are always allowed.

    Args:
        name: Name of the source.
        broken: Number of broken pairs.
        pairs: Number of all pairs.
        max_broken: Largest fraction of broken pairs.
        detail: End of the message.

    Raises:
        InputError: If too many pairs are broken.
    """
    if broken > max(100, max_broken * pairs):
        raise InputError(
            f"{name}: {broken:,} of {pairs:,} pairs are broken, more than max_broken ({max_broken:g}) allows; {detail}"
        )


def _detect_format(path: str) -> str:
    if path.endswith(".tar"):
        return "webdataset"
    folder = Path(path)
    if folder.is_dir():
        return "webdataset" if next(folder.glob("*.tar"), None) else "huggingface"
    return "files"


class TarPairs:
    """The pairs of webdataset tars."""

    def __init__(self, source: ImageSource, samples: ShardedSamples) -> None:
        """Create the source.

        Args:
            source: `source.caption` names the members with captions: "txt", one caption per line, or "json:KEY", a text
                or a list of texts. Default: txt if there are such members, otherwise json:caption.
            samples: The samples of the tars.

        Raises:
            InputError: If `source.caption` is invalid, or no sample has such a member.
        """
        self.source, self.samples = source, samples
        self.name, self.notices, self.sha256 = source.path, samples.notices, samples.sha256
        self.skipped = samples.skipped
        self.captions = source.caption or (("txt",) if samples.parts["txt"] else ("json:caption",))
        for caption in self.captions:
            part, _, key = caption.partition(":")
            if (part, bool(key)) not in (("txt", False), ("json", True)):
                raise InputError(f"{source.path}: caption: expected txt or json:KEY, found {caption!r}")
            if not samples.parts[part]:
                raise InputError(f"{source.path}: caption: expected members .{part}, found none in any sample")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row."""
        location = self.samples.location(row)
        content = self.samples.read(row, "image") if with_image else b""
        assert content is not None
        captions = [text for caption in self.captions for text in self._texts(row, caption, location)]
        return RawPair(content, _nonempty(captions, location), f"{self.sha256} {row}", location)

    def images_sha256(self) -> str:
        """Return the sha256 of the tars."""
        return self.sha256

    def _texts(self, row: int, caption: str, location: str) -> list[Any]:
        part, _, key = caption.partition(":")
        content = self.samples.read(row, part)
        if content is None:
            return []
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise BrokenPairError(f"{location}: expected UTF-8 in .{part}") from None
        if part == "txt":
            return text.splitlines()
        try:
            metadata = parse_json(text, location)
        except InputError as error:
            raise BrokenPairError(str(error)) from None
        if not isinstance(metadata, dict):
            raise BrokenPairError(f"{location}: expected a JSON object in .json, found {text!r:.60}")
        value = metadata.get(key)
        return value if isinstance(value, list) else [value]


class FilePairs:
    """The pairs of a table with a column of image paths and a column of captions."""

    def __init__(self, table: ExampleTable, folder: Path) -> None:
        self.table, self.folder = table, folder
        self.name, self.notices, self.sha256 = table.name, table.notices, table.sha256
        self.skipped = table.rows_skipped

    @classmethod
    def open(cls, source: ImageSource, cache: Path, progress: Callable[[int], None] | None) -> FilePairs:
        """Open a table, converted to a memory-mapped one in `cache`. Paths are relative to the table's folder."""
        captions = source.caption or ("caption",)
        if len(captions) > 1:
            raise InputError(f"{source.path}: caption: expected one column (its cells may be lists), found {captions}")
        table = open_source(
            SourceConfig(path=source.path, query=source.image, positive=captions[0]), cache, progress=progress
        )
        return cls(table, Path(source.path).resolve().parent)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row."""
        example = self.table[row]
        path = self.folder / example.query
        try:
            content = read_image_file(path) if with_image else b""
        except InputError as error:
            raise BrokenPairError(str(error)) from None
        except (OSError, ValueError) as error:
            # ValueError: the name contains a NUL.
            raise BrokenPairError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        return RawPair(content, _nonempty(list(example.positives), str(path)), example.query, str(path))

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
        self.captions = source.caption or ("caption" if "caption" in names else "text",)
        for column in (source.image, *self.captions):
            if column not in names:
                raise InputError(f"{source.path}: expected a column '{column}', found {', '.join(names)}")
        import datasets

        self._dataset = self._dataset.select_columns([source.image, *self.captions]).cast_column(
            source.image, datasets.Image(decode=False)
        )
        identity = [self._dataset._fingerprint, len(self._dataset), source.image, self.captions]
        self.sha256 = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row."""
        location = f"{self.name}: row {row}"
        cells = self._dataset[int(row)]
        content = self._bytes(cells[self.source.image] or {}, location) if with_image else b""
        captions = [cells[column] for column in self.captions]
        texts = [text for cell in captions for text in (cell if isinstance(cell, list) else [cell])]
        return RawPair(content, _nonempty(texts, location), f"{self.sha256} {row}", location)

    def images_sha256(self) -> str:
        """Return the sha256 of the dataset."""
        return self.sha256

    def _bytes(self, cell: dict[str, Any], location: str) -> bytes:
        content = cell.get("bytes")
        if content is None:
            if not cell.get("path"):
                raise BrokenPairError(f"{location}: expected an image in column '{self.source.image}', found none")
            try:
                content = read_image_file(Path(cell["path"]))
            except InputError as error:
                raise BrokenPairError(str(error)) from None
            except OSError as error:
                raise BrokenPairError(f"{cell['path']}: cannot be read: {error.strerror}") from None
        return content


def _nonempty(captions: list[Any], location: str) -> tuple[str, ...]:
    """Return the distinct non-empty captions, without NULs, at which tokenizers written in C would truncate them."""
    texts = [text.replace("\0", "\ufffd").strip() for text in captions if isinstance(text, str)]
    nonempty = tuple(dict.fromkeys(text for text in texts if text))
    if not nonempty:
        raise BrokenPairError(f"{location}: expected a caption that is not empty, found none")
    return nonempty
