"""Image files: those of a folder, and byte ranges of other files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from index.files import InputError, check_readable

MAX_FILE_BYTES = 2**28
"""Image files and members of tars that are larger are not read. An uncompressed image of 89 megapixels has as many."""

# In the order in which one is taken if a sample of a tar has several images.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif", "jpe", "mpo", "apng", "avifs", "dib"),
    *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "qoi", "tga"),
)
"""Extensions of image files, of all formats for pixels that Pillow reads."""
IMAGES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)

IMAGE_COLUMNS = ("image", "filepath", "file_name", "path", "file")
"""Columns of tables with images or their paths, in the order of preference."""
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
"""Columns of tables with captions, in the order of preference."""

SHOWN_SUFFIXES = 5


class StoredImage(Protocol):
    """An image of a dataset that can be read."""

    @property
    def name(self) -> str:
        """Its name in the dataset."""

    def read(self) -> bytes:
        """Read the bytes of the image."""


@dataclass(frozen=True, slots=True)
class ImageAt:
    """Location of an image: a file, or a byte range of a tar file."""

    path: Path
    name: str
    """Its name in the dataset: the path within the folder, or the path of the tar followed by that within it."""
    offset: int = 0
    size: int | None = None
    """Bytes from `offset` on; None: up to the end of the file."""

    def read(self) -> bytes:
        """Read the bytes of the image.

        Raises:
            InputError: the file does not exist, is a named pipe or device, or the image is larger than MAX_FILE_BYTES.
        """
        if self.size is not None and not 0 <= self.size <= MAX_FILE_BYTES:
            raise InputError(f"{self.name}: expected an image of at most {MAX_FILE_BYTES:,} bytes, found {self.size:,}")
        if self.size is None:
            return read_image_file(self.path)
        try:
            with open(self.path, "rb") as stream:
                stream.seek(self.offset)
                return stream.read(self.size)
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such file") from None


def read_image_file(path: Path) -> bytes:
    """Read the bytes of an image file.

    Raises:
        InputError: the file does not exist, is a named pipe or device, or is larger than MAX_FILE_BYTES.
        OSError: it cannot be read.
    """
    try:
        check_readable(path)
        with open(path, "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{path}: expected an image file of at most {MAX_FILE_BYTES:,} bytes")
    return content


def is_hidden(name: str) -> bool:
    """Whether a path within a folder or a tar is hidden: a part of it begins with a dot, or is __MACOSX or __meta__."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" or (part[:2] == part[-2:] == "__")
        for part in name.split("/")
    )


def choose_column(place: str, columns: Sequence[str], candidates: Sequence[str]) -> str:
    """Return the first of the candidates that is a column of a table.

    Args:
        place: The table, for messages.
        columns: The columns of the table.
        candidates: Names in the order of preference.

    Raises:
        InputError: none of them is.
    """
    for name in candidates:
        if name in columns:
            return name
    wanted = " or ".join(map(repr, candidates))
    hint = "; cells separated by tabs are read from a .tsv file" if any("\t" in column for column in columns) else ""
    raise InputError(f"{place}: expected a column {wanted}, found {', '.join(columns) or 'none'}{hint}")


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder, and what was ignored in it."""

    files: list[Path]
    """Sorted by path."""
    notices: list[str]
    """One line for each kind of entry that was ignored."""


def list_image_folder(folder: Path) -> ImageFolder:
    """List the image files (by suffix) of a folder and its subfolders, and count all other files by kind.

    Linked folders are followed, except for those that lead back to a folder above them. Hidden files and folders, and
    those that macOS adds to archives, are ignored.

    Raises:
        InputError: the folder cannot be read, or a file name is not UTF-8 and so cannot be an id or be in a report.
    """
    files: list[Path] = []
    ignored = _Ignored(folder)
    for file in _walk(folder, ignored, ()):
        if file.suffix.lower() in IMAGES:
            files.append(file)
        else:
            ignored.suffixes[file.suffix.lower() or "without a suffix"] += 1
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            shown = str(file).encode("utf-8", "backslashreplace").decode()
            raise InputError(f"{shown}: expected a name in UTF-8, found other bytes; rename the file") from None
    return ImageFolder(sorted(files), ignored.lines())


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted; see `list_image_folder`."""
    return list_image_folder(folder).files


class _Ignored:
    """Counts of ignored entries of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self.suffixes: Counter[str] = Counter()

    def add(self, kind: str, path: str) -> None:
        """Count an entry of a kind."""
        self._counts[kind] += 1
        shown = os.path.relpath(path, self._folder).encode("utf-8", "backslashreplace").decode()
        self._first.setdefault(kind, shown)

    def lines(self) -> list[str]:
        """One line for each kind."""
        lines = [f"{kind} ignored: {count:,} (first {self._first[kind]})" for kind, count in self._counts.items()]
        if self.suffixes:
            counts = [f"{suffix} {count:,}" for suffix, count in self.suffixes.most_common(SHOWN_SUFFIXES)]
            more = ", …" if len(self.suffixes) > SHOWN_SUFFIXES else ""
            total = self.suffixes.total()
            lines.append(f"files ignored that are not images: {total:,} ({', '.join(counts)}{more})")
        return lines


def _walk(folder: Path, ignored: _Ignored, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, without hidden ones; `above` identifies the folders above it."""
    try:
        stat = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    here = (*above, (stat.st_dev, stat.st_ino))
    for entry in entries:
        if is_hidden(entry.name):
            ignored.add("hidden files and folders", entry.path)
        elif entry.is_dir():
            target = os.stat(entry.path)
            if (target.st_dev, target.st_ino) in here:
                ignored.add("links to a folder above them", entry.path)
            else:
                yield from _walk(folder / entry.name, ignored, here)
        elif entry.is_file():
            yield folder / entry.name
        else:
            ignored.add("broken links and special files", entry.path)
