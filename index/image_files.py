"""Image files on disk: those in a folder, and where the bytes of one lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from index.files import InputError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class ImageAt:
    """Where the bytes of an image lie: a file, or a part of a tar."""

    path: Path
    name: str
    """What it is called in the set: the path within a folder, or that within a tar after the tar's."""
    offset: int = 0
    size: int | None = None
    """Bytes from `offset`; none: all that follow."""

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            InputError: the file is not there.
        """
        try:
            with open(self.path, "rb") as stream:
                stream.seek(self.offset)
                return stream.read(-1 if self.size is None else self.size)
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such file") from None


def images_in(folder: Path) -> list[Path]:
    """The files in a folder, and in those below it, whose ending is that of an image; sorted.

    Raises:
        InputError: the name of one is no UTF-8, so that no id and no report could say it.
    """
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
    for file in found:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            shown = str(file).encode("utf-8", "backslashreplace").decode()
            raise InputError(f"{shown}: expected a name in UTF-8, found other bytes; rename the file") from None
    return found
