"""From a picture file to pixels: decoding, crops and statistics, by Pillow and torch alone."""

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

from index.files import InputError
from retriever.utils.device import to_device

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of red, green and blue, of values from 0 to 1 (Radford et al., arXiv 2103.00020)."""
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The same of ImageNet, with which most vision encoders were trained."""

MAX_PIXELS = 89_478_485
"""A picture of more pixels is refused before it is decoded: Pillow's own limit, a quarter of a GiB as RGB."""

MAX_ASPECT = 64
"""A picture that is longer than so many times its other side is cut to that at its centre."""

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (0.75, 1.33)

# What Pillow raises for files that are cut short, damaged, or no pictures.
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


def open_image(source: Image.Image | Path | str | bytes, place: str = "image") -> Image.Image:
    """A picture, decoded to RGB: turned as its EXIF data say, what is transparent laid on white.

    Args:
        source: a file, its bytes, or a picture that Pillow has opened.
        place: name in messages of a picture that is no file.

    Raises:
        InputError: there is no such file, it is broken or no picture, or has more than MAX_PIXELS pixels.
    """
    if isinstance(source, Path | str):
        place = str(source)
    try:
        if isinstance(source, Image.Image):
            return _rgb(source, place)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _rgb(image, place, own=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{place}: no such file") from None
    except UnidentifiedImageError:
        # Pillow would name an object at an address.
        raise InputError(f"{place}: expected a picture, found bytes of no format that Pillow reads") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{place}: expected a picture, found one that cannot be read: {reason:.200}") from None


def _rgb(image: Image.Image, place: str, *, own: bool = False) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{place}: expected a picture of at most {MAX_PIXELS:,} pixels, found {width} x {height}")
    if image.mode == "RGB":
        if not own:
            return ImageOps.exif_transpose(image)
        # In place, so that what need not be turned is not copied, at a tenth of what decoding costs.
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("I", "F") or turned.mode.startswith("I;16"):
        return _of_deep_grey(turned, place)
    if turned.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in turned.info:
        white = Image.new("RGBA", turned.size, "white")
        return Image.alpha_composite(white, turned.convert("RGBA")).convert("RGB")
    return turned.convert("RGB")


def _of_deep_grey(image: Image.Image, place: str) -> Image.Image:
    # Pillow cuts values over 255 off, which makes 16 bits of grey white.
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError(f"{place}: expected a picture of at most 16 bits a channel, found one of mode {image.mode}")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _without_far_ends(image: Image.Image) -> Image.Image:
    # Resized whole, a line of 65,535 pixels would fill the memory; the crop at the centre shows none of its ends.
    width, height = image.size
    side = MAX_ASPECT * min(width, height)
    if max(width, height) <= side:
        return image
    left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
    return image.crop((left, top, min(width, left + side), min(height, top + side)))


@dataclass(frozen=True)
class ImageTransform:
    """How a picture becomes the pixels that a tower reads; picklable, for worker processes.

    Calling it makes pixels for evaluation: resized, cut at the centre, normalised, as the processors of transformers
    do. For training `augmented` takes a random part of the picture. Pixels stay bytes, a quarter of float32, until
    `normalised` turns them into what the tower reads, on its device.
    """

    size: tuple[int, int]
    """Height and width of the result."""
    resize: int | tuple[int, int] | None = None
    """Length of the shorter side before the centre is cut out, or height and width whatever the shape was; none: the
    shorter side of `size`."""
    resample: int = Image.Resampling.BICUBIC
    """Pillow's filter."""
    mean: tuple[float, ...] = CLIP_STATISTICS[0]
    std: tuple[float, ...] = CLIP_STATISTICS[1]
    flip: bool = False
    """Mirror half of the pictures in training."""

    @classmethod
    def of_processor(cls, processor: Any, place: str = "model") -> ImageTransform:
        """What an image processor of transformers does, said in this class.

        Raises:
            InputError: it does something that this class cannot say; the message names `place`.
        """
        size, crop = _sides(processor.size), _sides(getattr(processor, "crop_size", None))
        resizes, crops = getattr(processor, "do_resize", True), getattr(processor, "do_center_crop", False)
        exact = size if isinstance(size, tuple) else None
        result = crop if crops and isinstance(crop, tuple) else exact
        if not resizes or result is None or not getattr(processor, "do_rescale", True):
            raise InputError(
                f"{place}: expected an image processor with a fixed size of pixels, found {type(processor).__name__} "
                "(of SigLIP 2, take a checkpoint that is not NaFlex)"
            )
        normalises = getattr(processor, "do_normalize", True)
        return cls(
            size=result,
            resize=size,
            resample=int(processor.resample),
            mean=tuple(processor.image_mean) if normalises else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if normalises else (1.0, 1.0, 1.0),
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """float32 [3, height, width], the same for the same picture."""
        return self.normalised(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """uint8 [3, height, width] for evaluation, of an RGB picture."""
        target = min(self.size) if self.resize is None else self.resize
        if isinstance(target, int):
            image = _without_far_ends(image)
        width, height = image.size
        if isinstance(target, int):
            # The longer side is rounded down, as torchvision and transformers have it.
            shorter = min(width, height)
            target = (int(target * height / shorter), int(target * width / shorter))
        if (height, width) != target:
            image = image.resize((target[1], target[0]), self.resample)
        top, left = (target[0] - self.size[0]) // 2, (target[1] - self.size[1]) // 2
        # Pillow fills with black what lies outside, for a crop that is larger than the picture.
        return _bytes(image.crop((left, top, left + self.size[1], top + self.size[0])))

    def augmented(self, image: Image.Image, chance: np.random.Generator) -> Tensor:
        """uint8 [3, height, width] of a random part: a share of CROP_SCALE of the picture in a shape of CROP_RATIO.

        As torchvision's RandomResizedCrop (Szegedy et al., arXiv 1409.4842, the training of Inception).
        """
        box = random_crop(*image.size, chance)
        part = image.crop(box).resize((self.size[1], self.size[0]), self.resample)
        if self.flip and chance.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _bytes(part)

    def normalised(self, pixels: Tensor) -> Tensor:
        """float32 [..., 3, height, width] from bytes, on whichever device they are."""
        # (x / 255 - mean) / std, without a copy of the batch for each step of it.
        scale = [1 / (255 * std) for std in self.std]
        shift = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        # Made on the host: a tensor of numbers made on a GPU has the host wait for all that the GPU has still to do.
        of_scale, of_shift = (to_device(torch.tensor(each)[:, None, None], pixels.device) for each in (scale, shift))
        return torch.addcmul(of_shift, pixels.float(), of_scale)

    def with_statistics(self, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> ImageTransform:
        """The same with another mean and standard deviation."""
        return replace(self, mean=statistics[0], std=statistics[1])


def random_crop(width: int, height: int, chance: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a random part of a picture."""
    for _ in range(10):
        area = width * height * chance.uniform(*CROP_SCALE)
        ratio = math.exp(chance.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(chance.integers(width - w + 1)), int(chance.integers(height - h + 1))
            return left, top, left + w, top + h
    # A very long or very high picture: the largest part at its centre that the ratio allows.
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _bytes(image: Image.Image) -> Tensor:
    """uint8 [3, height, width] of an RGB picture."""
    pixels = np.empty((3, image.height * image.width), dtype=np.uint8)
    # Pillow takes its colours apart in a third of the time that an array of pixels takes to be turned round.
    for colour, name in zip(pixels, "RGB", strict=True):
        colour[:] = np.frombuffer(image.tobytes("raw", name), np.uint8)
    return torch.from_numpy(pixels).view(3, image.height, image.width)


def _sides(size: Any) -> int | tuple[int, int] | None:
    """transformers' size dictionary as the shorter side, or height and width; none for what is neither."""
    if size is None:
        return None
    values = {key: value for key, value in dict(size).items() if value is not None}
    if set(values) == {"shortest_edge"}:
        return int(values["shortest_edge"])
    if set(values) == {"height", "width"}:
        return int(values["height"]), int(values["width"])
    return None
