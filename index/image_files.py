"""Image files: those of a folder, and images within tar files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from index.files import InputError, check_readable

MAX_FILE_BYTES = 2**28
"""Image files and members of tars that are larger are not read. An uncompressed image of 89 megapixels has as many."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class ImageAt:
    """Location of an image: a file, or a byte range of a tar file."""

    path: Path
    name: str
    """Its name in the data set: the path within the folder, or the path of the tar followed by that within it."""
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


def images_in(folder: Path) -> list[Path]:
    """The image files (by suffix) of a folder and its subfolders, sorted.

    Raises:
        InputError: a file name is not UTF-8 and so cannot be used as an id or in a report.
    """
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
    for file in found:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            shown = str(file).encode("utf-8", "backslashreplace").decode()
            raise InputError(f"{shown}: expected a name in UTF-8, found other bytes; rename the file") from None
    return found
