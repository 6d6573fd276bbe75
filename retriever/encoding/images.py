"""A folder of pictures as vectors in the sharded store, to be indexed and searched like passages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import numpy as np
import psutil
import torch
from torch import Tensor

from index.files import InputError, sha256_file
from index.image_files import IMAGES, ImageAt, images_in
from index.passages import Passage
from index.progress import Reporter
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.encoding.encoder import EncodeOptions
from retriever.models.images.towers import ImageTextTowers
from retriever.models.images.transforms import open_image
from retriever.models.memory import default_encode_tokens
from retriever.models.mixed_precision import mixed_precision
from retriever.utils.check_progress import checksum_progress
from retriever.utils.device import to_device

# Pictures decoded together, ahead of the tower.
AT_ONCE = 256
SHOWN = 3


class Decoder:
    """Threads that make pixels of pictures; Pillow lets them run beside each other. Use as a context manager."""

    def __init__(self, towers: ImageTextTowers) -> None:
        self._transform = towers.transform
        self._pool = ThreadPoolExecutor(len(psutil.Process().cpu_affinity() or [0]))

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, pictures: Sequence[tuple[bytes | Path, str]]) -> list[Tensor | str]:
        """uint8 [3, height, width] of each (file or its bytes, its name), or why it cannot be read."""
        return list(self._pool.map(self._pixels, pictures))

    def _pixels(self, picture: tuple[bytes | Path, str]) -> Tensor | str:
        source, name = picture
        try:
            return self._transform.pixels(open_image(source, name))
        except InputError as error:
            return str(error).removeprefix(f"{source if isinstance(source, Path) else name}: ")


def embed_readable(
    towers: ImageTextTowers,
    decoder: Decoder,
    images: Sequence[ImageAt],
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Embeddings of images, float32 [images, dimension], and why which of them cannot be read."""
    decoded = decoder([(image.read(), image.name) for image in images])
    broken = {row: found for row, found in enumerate(decoded) if isinstance(found, str)}
    if broken and progress is not None:
        progress(len(broken))
    vectors = np.zeros((len(images), towers.dimension), dtype=np.float32)
    rows = [row for row in range(len(images)) if row not in broken]
    pixels = [found for found in decoded if not isinstance(found, str)]
    vectors[rows] = embed_pixels(towers, pixels, options, progress)
    return vectors, broken


def embed_pixels(
    towers: ImageTextTowers,
    pixels: Sequence[Tensor],
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Embeddings, float32 [pictures, dimension], of pixels as a `Decoder` gives them."""
    at_once = max(1, (options.micro_batch_tokens or default_encode_tokens(towers.device)) // towers.image_tokens)
    vectors = np.empty((len(pixels), towers.dimension), dtype=np.float32)
    with mixed_precision(towers, options.precision), torch.inference_mode():
        for start in range(0, len(pixels), at_once):
            some = to_device(torch.stack(list(pixels[start : start + at_once])), towers.device)
            vectors[start : start + len(some)] = towers({"pixels": some}).cpu().numpy()
            if progress is not None:
                progress(len(some))
    return vectors


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and in those below it, sorted.

    Raises:
        InputError: there are none, or the name of one is no UTF-8.
    """
    found = images_in(folder)
    if not found:
        raise InputError(f"{folder}: expected pictures ({', '.join(IMAGES)}), found none")
    return found


def encode_pictures(
    towers: ImageTextTowers,
    folder: Path,
    out: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    shard_rows: int = 65536,
) -> EmbeddingStore:
    """Embed the pictures of a folder into the store `out`; one that a killed run left is continued.

    A picture's id is its path from `folder`, quoted as in an address, and its text is that path. Pictures that cannot
    be read are counted, named and left out.

    Raises:
        InputError: there is no picture that can be read, or `out` holds something else.
    """
    files = picture_files(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    with reporter.bar(f"read {folder.name}", len(files), "pictures") as advance:
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
            with reporter.bar(f"encode {folder.name}", len(files), "pictures") as advance, Decoder(towers) as decoder:
                done, row = writer.rows, 0
                for some, pixels in _readable(decoder, files, names, broken):
                    # What an earlier run embedded is only counted: which pictures can be read is seen by reading them.
                    new = slice(max(0, done - row), None)
                    if pixels[new]:
                        passages = [Passage(quote(name), "", name) for name in some[new]]
                        writer.append(passages, embed_pixels(towers, pixels[new], options))
                    row += len(some)
                    advance(len(some))
            for name, why in list(broken.items())[:SHOWN]:
                reporter.line(f"{folder.name}: left out: {name}: {why}")
            if len(broken) > SHOWN:
                reporter.line(f"{folder.name}: {len(broken):,} pictures left out in all")
            if row == 0:
                raise InputError(f"{folder}: expected pictures, found none that can be read")
            writer.close()
    return EmbeddingStore.open(out)


def _readable(
    decoder: Decoder, files: Sequence[Path], names: Sequence[str], broken: dict[str, str]
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Names and pixels of the pictures that can be read, some at a time; the others go to `broken`."""
    for start in range(0, len(files), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        decoded = decoder(list(zip(files[part], names[part], strict=True)))
        good: list[str] = []
        pixels: list[Tensor] = []
        for name, found in zip(names[part], decoded, strict=True):
            if isinstance(found, str):
                broken[name] = found
            else:
                good.append(name)
                pixels.append(found)
        yield good, pixels


def _sha256(files: Sequence[Path], names: Sequence[str], progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    for file, name in zip(files, names, strict=True):
        digest.update(f"{name} {sha256_file(file)}\n".encode())
        progress(1)
    return digest.hexdigest()
