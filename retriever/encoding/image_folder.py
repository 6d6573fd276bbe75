"""Encoding of a folder of images into an embedding store, which can be indexed and searched like a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from torch import Tensor

from index.files import InputError, sha256_file
from index.image_files import IMAGES, images_in
from index.passages import Passage
from index.progress import Reporter
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.image_encoder import DECODE_BATCH, ImageDecoder, embed_pixels
from retriever.models.images.towers import ImageTextTowers
from retriever.utils.check_progress import checksum_progress

# Unreadable images that are named.
SHOWN_BROKEN = 3


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted.

    Raises:
        InputError: there are none, or a file name is not UTF-8.
    """
    files = images_in(folder)
    if not files:
        raise InputError(f"{folder}: expected images ({', '.join(IMAGES)}), found none")
    return files


def encode_image_folder(
    towers: ImageTextTowers,
    folder: Path,
    out: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    shard_rows: int = 65536,
) -> EmbeddingStore:
    """Embed the images of a folder into the store `out`; an incomplete store is continued.

    The text of an image is its path relative to `folder`; its id is the same path, quoted as in a URL. Unreadable
    images are left out; the first ones are named and all are counted.

    Args:
        towers: the model in evaluation mode, on the device to use.
        folder: the folder of the images.
        out: the folder of the store.
        options: precision, and the number of tokens (image patches) per forward pass.
        reporter: shows progress and names unreadable images.
        dtype: dtype of the vectors on disk.
        shard_rows: rows per shard.

    Raises:
        InputError: no image is readable, or `out` holds something else.
    """
    files = list_images(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    with reporter.bar(f"read {folder.name}", len(files), "images") as advance:
        sha256 = _sha256(files, names, advance)
    with (
        checksum_progress(reporter, [out]) as checked,
        EmbeddingWriter(
            out,
            dim=towers.dimension,
            dtype=dtype,
            model=towers.fingerprint(),
            source={"name": folder.resolve().name, "sha256": sha256, "precision": options.precision},
            shard_rows=shard_rows,
            checked=checked,
        ) as writer,
    ):
        if not writer.complete:
            broken: dict[str, str] = {}
            with (
                reporter.bar(f"encode {folder.name}", len(files), "images") as advance,
                ImageDecoder(towers) as decoder,
            ):
                stored, row = writer.rows, 0
                for readable, pixels in _readable(decoder, files, names, broken):
                    # Images that an earlier run has stored are decoded again, because unreadable ones have no row.
                    new = slice(max(0, stored - row), None)
                    if pixels[new]:
                        passages = [Passage(quote(name), "", name) for name in readable[new]]
                        writer.append(passages, embed_pixels(towers, pixels[new], options))
                    row += len(readable)
                    advance(len(readable))
            for name, reason in list(broken.items())[:SHOWN_BROKEN]:
                reporter.line(f"{folder.name}: left out: {name}: {reason}")
            if len(broken) > SHOWN_BROKEN:
                reporter.line(f"{folder.name}: {len(broken):,} images left out in all")
            if row == 0:
                raise InputError(f"{folder}: expected images, found none that can be read")
            writer.close()
    return EmbeddingStore.open(out)


def _readable(
    decoder: ImageDecoder, files: Sequence[Path], names: Sequence[str], broken: dict[str, str]
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Yield batches of names and pixels of readable images; unreadable ones are added to `broken` with the reason."""
    for start in range(0, len(files), DECODE_BATCH):
        batch = slice(start, start + DECODE_BATCH)
        decoded = decoder(list(zip(files[batch], names[batch], strict=True)))
        readable: list[str] = []
        pixels: list[Tensor] = []
        for name, outcome in zip(names[batch], decoded, strict=True):
            if isinstance(outcome, str):
                broken[name] = outcome
            else:
                readable.append(name)
                pixels.append(outcome)
        yield readable, pixels


def _sha256(files: Sequence[Path], names: Sequence[str], progress: Callable[[int], None]) -> str:
    """Hash of the names and contents of the files."""
    digest = hashlib.sha256()
    for file, name in zip(files, names, strict=True):
        digest.update(f"{name} {sha256_file(file)}\n".encode())
        progress(1)
    return digest.hexdigest()
