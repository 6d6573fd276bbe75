"""The images that `retriever encode` reads: those of a folder, of tars, of tables and of Hugging Face datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from index.fields.values import FieldValue, read_fields
from index.files import InputError, parse_json, sha256_file
from index.image_files.folders import CAPTION_COLUMNS, IMAGE_COLUMNS, IMAGES, choose_column, list_image_folder
from index.image_files.tables import ImageCell, ImageTable
from index.passages import Passage
from index.records import SUFFIXES, read_records
from retriever.data.images.remote import is_url, local_files
from retriever.data.images.sources import TARS, check_path, tar_files
from retriever.data.images.tars import ShardedSamples, index_shards
from retriever.errors import ArgumentError

Advance = Callable[[int], None]
ID_COLUMNS = ("_id", "id")
# Joins the captions of an image to the text that a search shows.
BETWEEN_CAPTIONS = " / "


class ImageItems(Protocol):
    """Images in a fixed order, with the passages that stand for them in a store."""

    name: str
    """Name of the data in messages and in the manifest."""
    notices: list[str]
    """One line for each kind of file or sample that was ignored."""

    def __len__(self) -> int: ...

    def passage(self, row: int) -> Passage:
        """The id of an image, and the text that a search shows."""

    def read(self, row: int) -> bytes | Path:
        """The bytes or the file of an image.

        Raises:
            InputError: The image cannot be read.
        """

    def sha256(self, progress: Advance) -> str:
        """Identify the images and their texts; `progress` is called with the number of images done."""


@dataclass(frozen=True)
class ImageColumns:
    """Where the images and captions are: columns of tables, or txt and json:KEY in tars. Empty: the usual names."""

    image: str = ""
    caption: str = ""
    fields: tuple[str, ...] = ()
    """Further columns of tables, or keys of KEY.json in tars, that an index keeps."""


def open_image_items(data: str, columns: ImageColumns, cache: Path, *, workers: int, progress: Advance) -> ImageItems:
    """Open images.

    Args:
        data: A folder of images, tars (as in training: a folder, braces, wildcards, .tar.gz, a URL), a table with a
            column of images or their paths, or a folder of Parquet files or of a saved Hugging Face dataset.
        columns: Where images and captions are.
        cache: Folder for indexes of tars and for downloads.
        workers: Number of processes that index tars.
        progress: Called with the number of tars done since the last call.

    Raises:
        InputError: The data cannot be read, or contain no image.
    """
    check_path(data)
    path = Path(data)
    if data.endswith(TARS) or (path.is_dir() and any(entry.name.endswith(TARS) for entry in path.iterdir())):
        shards = tar_files(data, cache, progress)
        samples = index_shards(data, shards, cache / "tars", captions=False, workers=workers, progress=progress)
        return TarImages(data, samples, columns.caption, columns.fields)
    if path.is_dir():
        table = ImageTable.open(path, None) if not list_image_folder(path).files else None
        if table is None and columns.fields:
            raise ArgumentError("fields", "leave it out with a folder of images, which has no columns")
        return FolderImages(path) if table is None else TableImages(path, table, columns)
    (file,) = local_files(data, cache, progress)[:1]
    return TableImages(file, ImageTable.open(file, None), columns)


def is_image_data(data: str, columns: ImageColumns) -> bool:
    """Whether data that are not a folder are images, not a corpus of texts.

    Tars are. A table is if a column of images is given, if it has one with images, or if it has one of the usual names
    and lacks the columns of a corpus.
    """
    if columns.image or data.endswith(TARS) or data.startswith("pipe:"):
        return True
    path = Path(data)
    if is_url(data):
        return data.partition("?")[0].endswith(".parquet")
    if not path.is_file() or not path.name.endswith(SUFFIXES):
        return False
    if path.suffix == ".parquet":
        table = ImageTable([path])
        names = table.columns
        if any(table.has_images(name) for name in IMAGE_COLUMNS if name in names):
            return True
    else:
        first = next(read_records(path), None)
        names = [] if first is None else list(first.fields)
    is_corpus = "text" in names and any(name in names for name in ID_COLUMNS)
    return not is_corpus and any(name in names for name in IMAGE_COLUMNS)


class FolderImages:
    """The images of a folder. The text of an image is its path relative to the folder; its id is the path, quoted."""

    def __init__(self, folder: Path) -> None:
        listed = list_image_folder(folder)
        if not listed.files:
            lines = [f"{folder}: expected images ({', '.join(IMAGES[:8])}, …), found none", *listed.notices]
            raise InputError("; ".join(lines))
        self.name, self.notices = folder.resolve().name, listed.notices
        self._files = listed.files
        self._names = [file.relative_to(folder).as_posix() for file in listed.files]

    def __len__(self) -> int:
        return len(self._files)

    def passage(self, row: int) -> Passage:
        """The path of an image, as id and text."""
        return Passage(quote(self._names[row]), "", self._names[row])

    def read(self, row: int) -> Path:
        """The file of an image."""
        return self._files[row]

    def sha256(self, progress: Advance) -> str:
        """Hash of the names and contents of the files."""
        digest = hashlib.sha256()
        for file, name in zip(self._files, self._names, strict=True):
            digest.update(f"{name} {sha256_file(file)}\n".encode())
            progress(1)
        return digest.hexdigest()


class TarImages:
    """The images of webdataset tars. The id of an image is TAR/KEY, quoted; its text is its captions, or else its id.

    Args:
        data: Name of the tars.
        samples: Their samples.
        caption: Where captions are: txt or json:KEY. Empty: txt if there are such members, otherwise the key caption.
        fields: Keys of KEY.json to keep as fields.

    Raises:
        InputError: `caption` is invalid.
    """

    def __init__(self, data: str, samples: ShardedSamples, caption: str, fields: Sequence[str] = ()) -> None:
        self.name, self.notices = Path(data.rstrip("/")).name, samples.notices
        self._samples, self._fields = samples, tuple(fields)
        self._caption = caption or ("txt" if samples.parts["txt"] else "json:caption")
        part, _, key = self._caption.partition(":")
        if (part, bool(key)) not in (("txt", False), ("json", True)):
            raise InputError(f"{data}: caption: expected txt or json:KEY, found {caption!r}")

    def __len__(self) -> int:
        return len(self._samples)

    def passage(self, row: int) -> Passage:
        """The tar and key of an image, and its captions."""
        name = f"{self._samples.shard(row).name}/{self._samples.key(row).removeprefix('./')}"
        fields = read_fields(self._about(row), self._fields, name) if self._fields else {}
        return Passage(quote(name), "", self._text(row) or name, fields)

    def read(self, row: int) -> bytes:
        """The bytes of an image."""
        return self._samples.read(row, "image") or b""

    def sha256(self, progress: Advance) -> str:
        """Hash of the positions and sizes in the tars, their names, sizes and times of modification, and `caption`."""
        stats = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in self._samples.shards]
        progress(len(self))
        return hashlib.sha256(
            json.dumps([self._samples.sha256, stats, self._caption, self._fields]).encode()
        ).hexdigest()

    def _text(self, row: int) -> str:
        part, _, key = self._caption.partition(":")
        found = self._content(row, part).splitlines() if part == "txt" else self._about(row).get(key)
        return BETWEEN_CAPTIONS.join(usable_texts(found))

    def _about(self, row: int) -> dict[str, Any]:
        try:
            about = parse_json(self._content(row, "json") or "{}", self.name)
        except InputError:
            return {}
        return about if isinstance(about, dict) else {}

    def _content(self, row: int, part: str) -> str:
        # An image without a readable caption can still be found.
        return (self._samples.read(row, part) or b"").decode("utf-8-sig", "replace")


class TableImages:
    """The images of a table. The id is in the column _id or id, otherwise it is the path of the image, or the row.

    Rows without an id that name the same file are one image with the captions of all.

    Args:
        path: The table, or the folder that contains it.
        table: The opened table, unless it is a text file.
        columns: Where images and captions are.

    Raises:
        InputError: A column is missing, the table is empty, or a row has no image.
    """

    def __init__(self, path: Path, table: ImageTable | None, columns: ImageColumns) -> None:
        self.name, self.notices = path.name, list[str]()
        self._folder = path if path.is_dir() else path.parent
        self._files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        self._images: list[ImageCell | Path] = []
        texts: dict[str, list[str]] = {}
        kept: list[Mapping[str, FieldValue]] = []
        for name, image, captions, fields in self._rows(path, table, columns):
            if name not in texts:
                self._images.append(image)
                kept.append(fields)
            elif not isinstance(image, Path):
                raise InputError(f"{path}: expected unique ids, found {name!r:.60} again")
            texts.setdefault(name, []).extend(captions)
        if not texts:
            raise InputError(f"{path}: expected images, found none")
        self._passages = [
            Passage(quote(name), "", BETWEEN_CAPTIONS.join(dict.fromkeys(own)) or name, fields)
            for (name, own), fields in zip(texts.items(), kept, strict=True)
        ]

    def _rows(
        self, path: Path, table: ImageTable | None, columns: ImageColumns
    ) -> Iterator[tuple[str, ImageCell | Path, list[str], Mapping[str, FieldValue]]]:
        """Yield the id, the image, the captions and the fields of each row."""
        first = None if table is not None else next(read_records(path), None)
        names = table.columns if table is not None else [] if first is None else list(first.fields)
        place = str(path) if first is None else first.place
        image = choose_column(place, names, [columns.image] if columns.image else IMAGE_COLUMNS)
        caption = next((name for name in CAPTION_COLUMNS if name in names and name != image), "")
        if columns.caption:
            caption = choose_column(place, names, [columns.caption])
        own_id = next((name for name in ID_COLUMNS if name in names), "")
        tops = [choose_column(place, names, [name, name.partition(".")[0]]) for name in columns.fields]
        stored = table is not None and table.has_images(image)
        wanted = [name for name in dict.fromkeys((own_id, caption, "" if stored else image, *tops)) if name]
        for row, record in enumerate(read_records(path) if table is None else table.records(wanted)):
            captions = usable_texts(record.fields.get(caption)) if caption else []
            given = record.fields.get(own_id) if own_id else None
            fields = read_fields(record.fields, columns.fields, record.place)
            if stored and table is not None:
                id_ = f"{path.stem}-{row}" if given is None else str(given)
                yield id_, ImageCell(table, image, row), captions, fields
                continue
            name = record.fields.get(image)
            if not isinstance(name, str) or not name or "://" in name:
                raise InputError(f"{record.place}: expected a path in column '{image}', found {name!r:.60}")
            yield name if given is None else str(given), self._folder / name, captions, fields

    def __len__(self) -> int:
        return len(self._images)

    def passage(self, row: int) -> Passage:
        """The id of an image, and its captions or its path."""
        return self._passages[row]

    def read(self, row: int) -> bytes | Path:
        """The bytes or the file of an image."""
        image = self._images[row]
        return image if isinstance(image, Path) else image.read()

    def sha256(self, progress: Advance) -> str:
        """Hash of the ids and texts, the files of the table, and sizes and times of modification of image files."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.name} {sha256_file(file)}\n".encode())
        for passage, image in zip(self._passages, self._images, strict=True):
            about: list[Any] = [passage.id, passage.text, dict(passage.fields)]
            if isinstance(image, Path) and image.is_file():
                about += [image.stat().st_size, image.stat().st_mtime_ns]
            digest.update(json.dumps(about).encode())
            progress(1)
        return digest.hexdigest()


def usable_texts(captions: object) -> list[str]:
    """The texts of a cell, a text or a list of texts, that are not empty."""
    texts: Sequence[object] = captions if isinstance(captions, list) else [captions]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]
