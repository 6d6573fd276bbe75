"""Encoding of images in memory: files, opened images, or pixels decoded before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from index.files import InputError
from index.image_files.folders import StoredImage
from retriever.encoding.encoder import EncodeOptions
from retriever.models.fsdp import encoding_mode
from retriever.models.images.towers import ImageTextTowers
from retriever.models.images.transforms import ImageTransform, open_image
from retriever.models.memory import default_encode_tokens
from retriever.models.mixed_precision import mixed_precision
from retriever.utils.device import to_device

ImageInput = Image.Image | Path | str

# Images that are decoded together, and those that a thread takes at a time.
DECODE_BATCH, DECODE_TASK = 256, 8


def embed_images(
    towers: ImageTextTowers,
    images: Sequence[ImageInput],
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Embed images, in their order.

    Args:
        towers: the model in evaluation mode, on the device to use.
        images: N files, or images that Pillow has opened. Files are decoded as they are needed.
        options: precision, and the number of tokens (image patches) per forward pass.
        progress: called with the number of images embedded since the last call.

    Returns:
        Embeddings of unit length, float32 [N, D].

    Raises:
        InputError: a file is missing, broken or too large; the message names it.
    """
    embeddings = np.empty((len(images), towers.dimension), dtype=np.float32)
    done = 0
    with mixed_precision(towers, options.precision), encoding_mode(towers):
        for pixels in _decoded(towers.transform, images, _batch_size(towers, options)):
            embeddings[done : done + len(pixels)] = _forward(towers, pixels)
            done += len(pixels)
            if progress is not None:
                progress(len(pixels))
    return embeddings


def embed_pixels(
    towers: ImageTextTowers,
    pixels: Sequence[Tensor],
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Embed decoded images, uint8 [3, height, width] each, as float32 [N, D]."""
    batch_size = _batch_size(towers, options)
    embeddings = np.empty((len(pixels), towers.dimension), dtype=np.float32)
    with mixed_precision(towers, options.precision), encoding_mode(towers):
        for start in range(0, len(pixels), batch_size):
            batch = pixels[start : start + batch_size]
            embeddings[start : start + len(batch)] = _forward(towers, torch.stack(list(batch)))
            if progress is not None:
                progress(len(batch))
    return embeddings


class ImageDecoder:
    """Decodes images in threads. Use as a context manager."""

    def __init__(self, towers: ImageTextTowers) -> None:
        self._transform = towers.transform
        self._pool = _thread_pool()

    def __enter__(self) -> ImageDecoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, images: Sequence[tuple[bytes | Path, str]]) -> list[Tensor | str]:
        """Decode (file or its bytes, name) pairs to uint8 [3, height, width], or to the reason why it failed."""
        return self.submit(images)()

    def submit(self, images: Sequence[tuple[bytes | Path, str]]) -> Callable[[], list[Tensor | str]]:
        """Start to decode images; the result waits for them."""
        starts = range(0, len(images), DECODE_TASK)
        tasks = [self._pool.submit(self._decoded, images[start : start + DECODE_TASK]) for start in starts]
        return lambda: [outcome for task in tasks for outcome in task.result()]

    def _decoded(self, images: Sequence[tuple[bytes | Path, str]]) -> list[Tensor | str]:
        return [self._pixels(image) for image in images]

    def _pixels(self, image: tuple[bytes | Path, str]) -> Tensor | str:
        source, name = image
        try:
            return self._transform.pixels(open_image(source, name))
        except InputError as error:
            return str(error).removeprefix(f"{source if isinstance(source, Path) else name}: ")


def embed_readable(
    towers: ImageTextTowers,
    decoder: ImageDecoder,
    images: Sequence[StoredImage],
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Embed the images that can be decoded.

    Returns:
        Embeddings, float32 [N, D], with a row of zeros for each unreadable image; and index -> reason of these.
    """
    decoded = decoder([(image.read(), image.name) for image in images])
    broken = {row: outcome for row, outcome in enumerate(decoded) if isinstance(outcome, str)}
    if broken and progress is not None:
        progress(len(broken))
    vectors = np.zeros((len(images), towers.dimension), dtype=np.float32)
    rows = [row for row in range(len(images)) if row not in broken]
    pixels = [outcome for outcome in decoded if not isinstance(outcome, str)]
    vectors[rows] = embed_pixels(towers, pixels, options, progress)
    return vectors, broken


def _batch_size(towers: ImageTextTowers, options: EncodeOptions) -> int:
    return max(1, (options.micro_batch_tokens or default_encode_tokens(towers.device)) // towers.image_tokens)


def _forward(towers: ImageTextTowers, pixels: Tensor) -> np.ndarray:
    return towers({"pixels": to_device(pixels, towers.device)}).cpu().numpy()


def _thread_pool() -> ThreadPoolExecutor:
    # Pillow releases Python's lock while it decodes and resizes.
    return ThreadPoolExecutor(len(psutil.Process().cpu_affinity() or [0]))


def _decoded(transform: ImageTransform, images: Sequence[ImageInput], batch_size: int) -> Iterator[Tensor]:
    """Yield batches of uint8 pixels [n, 3, height, width]; the next batch is decoded while one is embedded."""

    def pixels(number: int) -> Tensor:
        return transform.pixels(open_image(images[number], f"image {number}"))

    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    with _thread_pool() as pool:
        pending = [pool.submit(pixels, number) for batch in batches[:1] for number in batch]
        for index, _ in enumerate(batches):
            current = pending
            pending = [pool.submit(pixels, number) for batch in batches[index + 1 : index + 2] for number in batch]
            yield torch.stack([future.result() for future in current])
