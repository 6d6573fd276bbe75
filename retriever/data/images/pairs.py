"""Pairs of an image and its captions, and what a source of such pairs is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from index.files import InputError
from index.image_files.folders import read_image_file
from retriever.models.images.decoding import open_image


@dataclass(frozen=True)
class RawPair:
    """An encoded image with its captions."""

    image: bytes
    captions: tuple[str, ...]
    """At least one; none is empty."""
    key: str
    """Equal for rows with the same image."""
    source: PairSource = field(compare=False, repr=False)
    row: int

    @property
    def location(self) -> str:
        """File and name of the pair, for messages."""
        return self.source.location(self.row)

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

    def location(self, row: int) -> str:
        """Return the file and name of a pair, for messages."""

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row; `image` is empty unless `with_image`.

        Raises:
            BrokenPairError: If the image or the caption is missing.
        """

    def images_sha256(self) -> str:
        """Return a sha256 that identifies the images, for cached features."""


def read_file(path: Path) -> bytes:
    """Read an image file.

    Raises:
        BrokenPairError: If it cannot be read.
    """
    try:
        return read_image_file(path)
    except InputError as error:
        raise BrokenPairError(str(error)) from None
    except (OSError, ValueError) as error:
        # ValueError: the name contains a NUL.
        raise BrokenPairError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def image_bytes(cell: Any, source: PairSource, row: int, folder: Path | None = None) -> bytes:
    """Return the bytes of an image in a cell: bytes, or a struct of bytes and path as Hugging Face datasets write it.

    Args:
        cell: The cell.
        source: The source of the pair, for messages.
        row: The row of the pair, for messages.
        folder: Folder that paths are relative to. Default: None, the working directory.

    Raises:
        BrokenPairError: If there is no image, or its file cannot be read.
    """
    if isinstance(cell, bytes) and cell:
        return cell
    if isinstance(cell, dict):
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        if cell.get("path"):
            return read_file((folder or Path()) / cell["path"])
    raise BrokenPairError(f"{source.location(row)}: expected an image, found none in its cell")


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


def usable_captions(captions: Iterable[Any], source: PairSource, row: int) -> tuple[str, ...]:
    """Return the distinct non-empty captions, without NULs, at which tokenizers written in C would truncate them.

    Raises:
        BrokenPairError: If there is none.
    """
    texts = [text.replace("\0", "\ufffd").strip() for text in captions if isinstance(text, str)]
    nonempty = tuple(dict.fromkeys(text for text in texts if text))
    if not nonempty:
        raise BrokenPairError(f"{source.location(row)}: expected a caption that is not empty, found none")
    return nonempty
