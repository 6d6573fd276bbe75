"""Images to embeddings: a list of files or opened images, embedded in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from retriever.encoding.encoder import EncodeOptions
from retriever.models.images.towers import ImageTextTowers
from retriever.models.images.transforms import ImageTransform, open_image
from retriever.models.memory import default_encode_tokens
from retriever.models.mixed_precision import mixed_precision
from retriever.utils.device import to_device

ImageInput = Image.Image | Path | str


def embed_images(
    towers: ImageTextTowers,
    images: Sequence[ImageInput],
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Embed images, in their order.

    Args:
        towers: Image and text towers in evaluation mode, on the device to use.
        images: Files, or images that Pillow has opened. Files are decoded as they are needed.
        options: Precision, and the number of tokens (patches of images) per forward pass.
        progress: Called with the number of images embedded since the last call.

    Returns:
        [images, dimension] float32 embeddings of unit length.

    Raises:
        InputError: A file is missing, broken or too large. The message names it.
    """
    batch_size = max(1, (options.micro_batch_tokens or default_encode_tokens(towers.device)) // towers.image_tokens)
    embeddings = np.empty((len(images), towers.dimension), dtype=np.float32)
    done = 0
    with mixed_precision(towers, options.precision), torch.inference_mode():
        for pixels in _decoded(towers.transform, images, batch_size):
            vectors = towers({"pixels": to_device(pixels, towers.device)})
            embeddings[done : done + len(vectors)] = vectors.cpu().numpy()
            done += len(vectors)
            if progress is not None:
                progress(len(vectors))
    return embeddings


def _decoded(transform: ImageTransform, images: Sequence[ImageInput], batch_size: int) -> Iterator[Tensor]:
    """Batches of uint8 pixels [n, 3, height, width]; the next batch is decoded while the current one is embedded."""

    def pixels(number: int) -> Tensor:
        return transform.pixels(open_image(images[number], f"image {number}"))

    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    # Pillow releases the GIL while it decodes and resizes.
    with ThreadPoolExecutor(len(psutil.Process().cpu_affinity() or [0])) as pool:
        pending = [pool.submit(pixels, number) for batch in batches[:1] for number in batch]
        for place, _ in enumerate(batches):
            current = pending
            pending = [pool.submit(pixels, number) for batch in batches[place + 1 : place + 2] for number in batch]
            yield torch.stack([future.result() for future in current])
