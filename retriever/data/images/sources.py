"""Pairs of a picture and its captions by row: from tars, from files that name pictures, from Hugging Face datasets."""

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
from retriever.config.images import ImageSource
from retriever.config.sources import SourceConfig
from retriever.data.images.tars import ShardedSamples, index_shards
from retriever.data.sources import load_huggingface
from retriever.data.table import ExampleTable, open_source
from retriever.models.images.transforms import open_image


@dataclass(frozen=True)
class RawPair:
    """A picture as it lies on the disk, with its captions."""

    picture: bytes
    captions: tuple[str, ...]
    """At least one; none is empty."""
    key: str
    """The same for rows that show the same picture."""
    place: str
    """For messages."""

    def open(self) -> Image.Image:
        """The picture, decoded.

        Raises:
            BrokenPairError: it is broken, no picture, or too large.
        """
        try:
            return open_image(self.picture, self.place)
        except InputError as error:
            raise BrokenPairError(str(error)) from None


class BrokenPairError(InputError):
    """A pair that cannot be used, though the source as a whole can."""


class PairSource(Protocol):
    """The pairs of one source; picklable."""

    name: str
    notices: list[str]
    left_out: int
    """Pairs that are not here, because their picture or caption was seen to be missing before they are read."""
    sha256: str

    def __len__(self) -> int: ...

    def read(self, row: int, picture: bool = True) -> RawPair:
        """The pair of a row, without the bytes of its picture if they are not asked for.

        Raises:
            BrokenPairError: it lacks its picture or a caption.
        """

    def images_sha256(self) -> str:
        """What identifies the pictures, for what is computed of them once and kept."""


def open_pairs(
    source: ImageSource, cache: Path, *, workers: int = 0, progress: Callable[[int], None] | None = None
) -> PairSource:
    """Open a source; what must be indexed or converted for that is kept in the folder `cache`.

    Raises:
        InputError: it is missing, broken or empty, lacks a column, or has more pairs to leave out than it allows.
    """
    kind = source.format if source.format != "auto" else _kind(source.path)
    pairs: PairSource
    if kind == "webdataset":
        pairs = TarPairs(source, index_shards(source.path, cache / "tars", workers=workers, progress=progress))
    elif kind == "files":
        pairs = FilePairs.open(source, cache, progress)
    else:
        pairs = HuggingFacePairs(source)
    every = pairs.left_out + len(pairs)
    check_broken(source.path, pairs.left_out, every, source.max_broken, "; ".join(pairs.notices))
    return pairs


def check_broken(name: str, broken: int, pairs: int, max_broken: float, which: str) -> None:
    """Stop where too many pairs of a source cannot be used; a hundred are never too many.

    Raises:
        InputError: more than `max_broken` of them; it ends in `which`.
    """
    if broken > max(100, max_broken * pairs):
        raise InputError(
            f"{name}: {broken:,} of {pairs:,} pairs are broken, more than max_broken ({max_broken:g}) allows; {which}"
        )


def _kind(path: str) -> str:
    if path.endswith(".tar"):
        return "webdataset"
    folder = Path(path)
    if folder.is_dir():
        return "webdataset" if next(folder.glob("*.tar"), None) else "huggingface"
    return "files"


class TarPairs:
    """The pairs of webdataset tars."""

    def __init__(self, source: ImageSource, samples: ShardedSamples) -> None:
        """Read captions as `source.caption` says: txt, a caption on each line; json:KEY, a text or a list of texts.

        Raises:
            InputError: it names something else, or nothing that any sample has.
        """
        self.source, self.samples = source, samples
        self.name, self.notices, self.sha256 = source.path, samples.notices, samples.sha256
        self.left_out = samples.left_out
        self.captions = source.caption or (("txt",) if samples.parts["txt"] else ("json:caption",))
        for caption in self.captions:
            part, _, key = caption.partition(":")
            if (part, bool(key)) not in (("txt", False), ("json", True)):
                raise InputError(f"{source.path}: caption: expected txt or json:KEY, found {caption!r}")
            if not samples.parts[part]:
                raise InputError(f"{source.path}: caption: expected members .{part}, found none in any sample")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, row: int, picture: bool = True) -> RawPair:
        """The pair of a row."""
        place = self.samples.place(row)
        content = self.samples.read(row, "picture") if picture else b""
        assert content is not None
        captions = [text for caption in self.captions for text in self._texts(row, caption, place)]
        return RawPair(content, _checked(captions, place), f"{self.sha256} {row}", place)

    def images_sha256(self) -> str:
        """That of the tars."""
        return self.sha256

    def _texts(self, row: int, caption: str, place: str) -> list[Any]:
        part, _, key = caption.partition(":")
        content = self.samples.read(row, part)
        if content is None:
            return []
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise BrokenPairError(f"{place}: expected UTF-8 in .{part}") from None
        if part == "txt":
            return text.splitlines()
        try:
            about = parse_json(text, place)
        except InputError as error:
            raise BrokenPairError(str(error)) from None
        if not isinstance(about, dict):
            raise BrokenPairError(f"{place}: expected a JSON object in .json, found {text!r:.60}")
        found = about.get(key)
        return found if isinstance(found, list) else [found]


class FilePairs:
    """The pairs of a table: a column with paths of pictures, and one or more with captions."""

    def __init__(self, table: ExampleTable, folder: Path) -> None:
        self.table, self.folder = table, folder
        self.name, self.notices, self.sha256 = table.name, table.notices, table.sha256
        self.left_out = table.rows_skipped

    @classmethod
    def open(cls, source: ImageSource, cache: Path, progress: Callable[[int], None] | None) -> FilePairs:
        """Convert the table to a memory-mapped one, unless that was done before."""
        captions = source.caption or ("caption",)
        if len(captions) > 1:
            raise InputError(f"{source.path}: caption: expected one column (its cells may be lists), found {captions}")
        table = open_source(
            SourceConfig(path=source.path, query=source.image, positive=captions[0]), cache, progress=progress
        )
        return cls(table, Path(source.path).resolve().parent)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, row: int, picture: bool = True) -> RawPair:
        """The pair of a row."""
        example = self.table[row]
        path = self.folder / example.query
        try:
            content = path.read_bytes() if picture else b""
        except (OSError, ValueError) as error:
            # ValueError: a NUL in the name.
            raise BrokenPairError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        return RawPair(content, _checked(list(example.positives), str(path)), example.query, str(path))

    def images_sha256(self) -> str:
        """Of the table, and of size and time of every file: a picture may be replaced under its name."""
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
    """The pairs of a Hugging Face dataset with an image column; one of the hub is downloaded to its cache first."""

    def __init__(self, source: ImageSource) -> None:
        """Open it.

        Raises:
            InputError: it cannot be read, or lacks a column.
        """
        self.source, self.name = source, source.path
        self.notices: list[str] = []
        self.left_out = 0
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

    def read(self, row: int, picture: bool = True) -> RawPair:
        """The pair of a row."""
        place = f"{self.name}: row {row}"
        cells = self._dataset[int(row)]
        content = self._bytes(cells[self.source.image] or {}, place) if picture else b""
        found = [cells[column] for column in self.captions]
        texts = [text for cell in found for text in (cell if isinstance(cell, list) else [cell])]
        return RawPair(content, _checked(texts, place), f"{self.sha256} {row}", place)

    def images_sha256(self) -> str:
        """That of the dataset."""
        return self.sha256

    def _bytes(self, picture: dict[str, Any], place: str) -> bytes:
        content = picture.get("bytes")
        if content is None:
            if not picture.get("path"):
                raise BrokenPairError(f"{place}: expected a picture in column '{self.source.image}', found none")
            try:
                content = Path(picture["path"]).read_bytes()
            except OSError as error:
                raise BrokenPairError(f"{picture['path']}: cannot be read: {error.strerror}") from None
        return content


def _checked(captions: list[Any], place: str) -> tuple[str, ...]:
    """The captions that say something; tokenizers written in C end a text at its first NUL."""
    texts = [text.replace("\0", "\ufffd").strip() for text in captions if isinstance(text, str)]
    found = tuple(dict.fromkeys(text for text in texts if text))
    if not found:
        raise BrokenPairError(f"{place}: expected a caption, found none that is not empty")
    return found
