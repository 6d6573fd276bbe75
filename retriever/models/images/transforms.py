"""Decoding, cropping and normalizing images, with Pillow and torch."""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from index.files import InputError, check_readable
from retriever.utils.device import to_device

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""CLIP's mean and standard deviation of red, green and blue, for values in [0, 1] (arXiv 2103.00020)."""
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet, with which most other vision encoders were trained."""

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused before they are decoded. Pillow's limit; a quarter of a GiB as RGB."""

MAX_ASPECT = 64
"""Images with a larger ratio of the longer to the shorter side are cropped to this ratio at the center."""

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (0.75, 1.33)

# Exceptions that Pillow raises for truncated or damaged files, and for files that are not images.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def open_image(source: Image.Image | Path | str | bytes, location: str = "image") -> Image.Image:
    """Decode an image to RGB. It is rotated according to its EXIF data; transparent pixels are put on white.

    Args:
        source: A path, the bytes of a file, or an image opened by Pillow.
        location: Name of the image in messages, if `source` is not a path. Default: "image".

    Raises:
        InputError: If there is no such file, it is damaged or not an image, or it has more than MAX_PIXELS pixels.
    """
    if isinstance(source, Path | str):
        location = str(source)
    try:
        if isinstance(source, Image.Image):
            return _rgb(source, location)
        if not isinstance(source, bytes):
            check_readable(Path(source))
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _rgb(image, location, own=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{location}: no such file") from None
    except UnidentifiedImageError:
        # Pillow's message would be the repr of a BytesIO.
        raise InputError(f"{location}: expected an image, found bytes in no format that Pillow reads") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{location}: expected an image, found one that cannot be read: {reason:.200}") from None


def _rgb(image: Image.Image, location: str, *, own: bool = False) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{location}: expected an image of at most {MAX_PIXELS:,} pixels, found {width} x {height}")
    if image.mode == "RGB":
        if not own:
            return ImageOps.exif_transpose(image)
        # In location, so that an image that is not rotated is not copied; a copy takes a tenth of the time of decoding.
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    rotated = ImageOps.exif_transpose(image)
    if rotated.mode in ("I", "F") or rotated.mode.startswith("I;16"):
        return _gray16_to_rgb(rotated, location)
    if rotated.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in rotated.info:
        white = Image.new("RGBA", rotated.size, "white")
        return Image.alpha_composite(white, rotated.convert("RGBA")).convert("RGB")
    return rotated.convert("RGB")


def _gray16_to_rgb(image: Image.Image, location: str) -> Image.Image:
    # Pillow clips values above 255, which would turn 16-bit gray into white.
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError(f"{location}: expected an image of at most 16 bits per channel, found mode {image.mode}")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _crop_to_max_aspect(image: Image.Image) -> Image.Image:
    """Crop an image at its center to the ratio MAX_ASPECT.

    Resizing an image of 1 × 65,535 pixels would exhaust the memory. The center crop that follows discards its ends.
    """
    width, height = image.size
    side = MAX_ASPECT * min(width, height)
    if max(width, height) <= side:
        return image
    left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
    return image.crop((left, top, min(width, left + side), min(height, top + side)))


@dataclass(frozen=True)
class ImageTransform:
    """Conversion of an image to the input of an image tower. Picklable, for worker processes.

    Calling it returns the input for evaluation: resized, center-cropped and normalized, as by the image processors of
    transformers. For training, `augment` takes a random crop. Pixels remain uint8 until `normalize`, which runs on the
    towers' device.
    """

    size: tuple[int, int]
    """Height and width of the result."""
    resize: int | tuple[int, int] | None = None
    """Length of the shorter side before the center crop, or height and width regardless of the aspect ratio. None: the
    shorter side of `size`."""
    resample: int = Image.Resampling.BICUBIC
    """Pillow's resampling filter."""
    mean: tuple[float, ...] = CLIP_STATISTICS[0]
    """Mean of red, green and blue, for values in [0, 1]."""
    std: tuple[float, ...] = CLIP_STATISTICS[1]
    """Standard deviation of red, green and blue."""
    flip: bool = False
    """Whether `augment` flips half of the images horizontally."""

    @classmethod
    def of_processor(cls, processor: Any, location: str = "model") -> ImageTransform:
        """Return the transform that equals an image processor of transformers.

        Args:
            processor: The image processor.
            location: Name of the model in messages. Default: "model".

        Raises:
            InputError: If the processor does not resize to a fixed size and rescale to [0, 1].
        """
        size, crop = _sides(processor.size), _sides(getattr(processor, "crop_size", None))
        resizes, crops = getattr(processor, "do_resize", True), getattr(processor, "do_center_crop", False)
        exact = size if isinstance(size, tuple) else None
        result = crop if crops and isinstance(crop, tuple) else exact
        if not resizes or result is None or not getattr(processor, "do_rescale", True):
            raise InputError(
                f"{location}: expected an image processor with a fixed size, found {type(processor).__name__} "
                "(of SigLIP 2, take a checkpoint that is not NaFlex)"
            )
        normalizes = getattr(processor, "do_normalize", True)
        return cls(
            size=result,
            resize=size,
            resample=int(processor.resample),
            mean=tuple(processor.image_mean) if normalizes else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if normalizes else (1.0, 1.0, 1.0),
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the input for evaluation, float32 [3, height, width], of an RGB image."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and center-crop an RGB image for evaluation: uint8 [3, height, width]."""
        target = min(self.size) if self.resize is None else self.resize
        if isinstance(target, int):
            image = _crop_to_max_aspect(image)
        width, height = image.size
        if isinstance(target, int):
            # The longer side is rounded down, as in torchvision and transformers.
            shorter = min(width, height)
            target = (int(target * height / shorter), int(target * width / shorter))
        if (height, width) != target:
            image = image.resize((target[1], target[0]), self.resample)
        top, left = (target[0] - self.size[0]) // 2, (target[1] - self.size[1]) // 2
        # Pillow fills areas outside the image with black, if the crop is larger than the image.
        return _to_tensor(image.crop((left, top, left + self.size[1], top + self.size[0])))

    def augment(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        """Resize a random crop of an RGB image for training: uint8 [3, height, width].

        The crop's area is a fraction in CROP_SCALE of the image, and its aspect ratio is in CROP_RATIO. Equals
        torchvision's RandomResizedCrop (Szegedy et al., arXiv 1409.4842).
        """
        box = random_crop(*image.size, generator)
        crop = image.crop(box).resize((self.size[1], self.size[0]), self.resample)
        if self.flip and generator.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _to_tensor(crop)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Convert uint8 [..., 3, height, width] to normalized float32, on the device of `pixels`."""
        # (x / 255 - mean) / std as one operation, without intermediate copies of the batch.
        scale = [1 / (255 * std) for std in self.std]
        shift = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        # Created on the host: creating a tensor from numbers on a GPU would synchronize.
        scale_tensor, shift_tensor = (
            to_device(torch.tensor(values)[:, None, None], pixels.device) for values in (scale, shift)
        )
        return torch.addcmul(shift_tensor, pixels.float(), scale_tensor)

    def with_statistics(self, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> ImageTransform:
        """Return a copy with another mean and standard deviation."""
        return replace(self, mean=statistics[0], std=statistics[1])


def random_crop(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Return the left, upper, right and lower edge of a random crop of an image."""
    for _ in range(10):
        area = width * height * generator.uniform(*CROP_SCALE)
        ratio = math.exp(generator.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    # For a very wide or very tall image: the largest center crop within the ratios.
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to uint8 [3, height, width]."""
    pixels = np.empty((3, image.height * image.width), dtype=np.uint8)
    # Pillow separates the channels in a third of the time that transposing an array takes.
    for channel, name in zip(pixels, "RGB", strict=True):
        channel[:] = np.frombuffer(image.tobytes("raw", name), np.uint8)
    return torch.from_numpy(pixels).view(3, image.height, image.width)


def _sides(size: Any) -> int | tuple[int, int] | None:
    """Return the shorter side, or height and width, of transformers' size dictionary; None if it has neither."""
    if size is None:
        return None
    values = {key: value for key, value in dict(size).items() if value is not None}
    if set(values) == {"shortest_edge"}:
        return int(values["shortest_edge"])
    if set(values) == {"height", "width"}:
        return int(values["height"]), int(values["width"])
    return None
