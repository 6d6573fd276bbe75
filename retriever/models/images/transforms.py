"""Resizing, cropping and normalizing images, with Pillow and torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from index.files import InputError
from retriever.models.images.decoding import open_image
from retriever.utils.device import to_device

# open_image is used with transforms everywhere.
__all__ = ["CLIP_STATISTICS", "IMAGENET_STATISTICS", "ImageTransform", "open_image", "random_crop"]

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""CLIP's mean and standard deviation of red, green and blue, for values in [0, 1] (arXiv 2103.00020)."""
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet, with which most other vision encoders were trained."""

MAX_ASPECT = 64
"""Images with a larger ratio of the longer to the shorter side are cropped to this ratio at the center."""

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (0.75, 1.33)


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
    crop_scale: tuple[float, float] = CROP_SCALE
    """Smallest and largest area of the crops of `augment`, as fractions of the image."""
    crop_ratio: tuple[float, float] = CROP_RATIO
    """Smallest and largest ratio of width to height of the crops of `augment`."""
    jitter: float = 0.0
    """Largest change of brightness, contrast and saturation by `augment`, as a fraction."""

    scale: float = 1 / 255
    """Factor of pixel values before the mean is subtracted, `rescale_factor` of transformers."""

    @classmethod
    def of_processor(cls, processor: Any, location: str = "model") -> ImageTransform:
        """Return the transform that equals an image processor of transformers.

        The processor and the transform are applied to a test image and compared, because processors have many more
        settings than are read here.

        Args:
            processor: The image processor.
            location: Name of the model in messages. Default: "model".

        Raises:
            InputError: If the processor does not resize or center-crop to a fixed size, or does anything else than to
                resize, center-crop, rescale and normalize.
        """
        size, crop = _sides(getattr(processor, "size", None)), _sides(getattr(processor, "crop_size", None))
        crops = bool(getattr(processor, "do_center_crop", False))
        result = crop if crops and isinstance(crop, tuple) else size
        if not getattr(processor, "do_resize", True) or size is None or not isinstance(result, tuple):
            raise InputError(
                f"{location}: expected an image processor that resizes to a fixed height and width or center-crops, "
                f"found {_description(processor)}"
            )
        normalizes = getattr(processor, "do_normalize", True)
        transform = cls(
            size=result,
            resize=size,
            resample=int(processor.resample),
            mean=tuple(processor.image_mean) if normalizes else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if normalizes else (1.0, 1.0, 1.0),
            scale=float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0,
        )
        transform._check_equals(processor, location)
        return transform

    def _check_equals(self, processor: Any, location: str) -> None:
        """Check that a processor gives the same input for a smooth test image, but for rounding."""
        y, x = np.mgrid[0:61, 0:97]
        waves = [128 + 100 * np.sin(x / 17 + y / 23), 2 * x + y / 2, 250 - 3 * y]
        image = Image.fromarray(np.stack(waves, axis=2).clip(0, 255).astype(np.uint8))
        theirs = np.asarray(processor(images=[image], return_tensors="np")["pixel_values"])[0]
        ours = self(image).numpy()
        # Resizing by another backend rounds differently; a wrong size, order or factor differs by far more.
        allowed = 8 * self.scale / min(self.std)
        if ours.shape != theirs.shape or not (np.abs(ours - theirs) <= allowed).all():
            found = f"shape {theirs.shape}" if ours.shape != theirs.shape else f"{np.abs(ours - theirs).max():.3g} more"
            raise InputError(
                f"{location}: expected an image processor that only resizes, center-crops, rescales and normalizes, "
                f"found {_description(processor)}, whose output for a test image differs ({found})"
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

        The crop's area is a fraction in `crop_scale` of the image, and its aspect ratio is in `crop_ratio`. Equals
        torchvision's RandomResizedCrop (Szegedy et al., arXiv 1409.4842). Brightness, contrast and saturation are
        changed as by torchvision's ColorJitter, in this order.
        """
        box = random_crop(*image.size, generator, self.crop_scale, self.crop_ratio)
        crop = image.crop(box).resize((self.size[1], self.size[0]), self.resample)
        if self.flip and generator.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                crop = change(crop).enhance(generator.uniform(1 - self.jitter, 1 + self.jitter))
        return _to_tensor(crop)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Convert uint8 [..., 3, height, width] to normalized float32, on the device of `pixels`."""
        # (scale x - mean) / std as one operation, in the memory of the converted batch: on a CPU, allocating it again
        # takes as long as computing it.
        scale = [self.scale / std for std in self.std]
        shift = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        # Created on the host: creating a tensor from numbers on a GPU would synchronize.
        scale_tensor, shift_tensor = (
            to_device(torch.tensor(values)[:, None, None], pixels.device) for values in (scale, shift)
        )
        values = pixels.to(torch.float32, copy=True)
        return torch.addcmul(shift_tensor, values, scale_tensor, out=values)

    def identity(self) -> dict[str, Any]:
        """Everything that the input for evaluation depends on, for checksums of models."""
        names = ("size", "resize", "resample", "mean", "std", "flip")
        identity = {name: getattr(self, name) for name in names}
        # Left out if it is the default, so that the checksums of models are those of earlier versions.
        return identity if self.scale == 1 / 255 else {**identity, "scale": self.scale}

    def with_statistics(self, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> ImageTransform:
        """Return a copy with another mean and standard deviation."""
        return replace(self, mean=statistics[0], std=statistics[1])


def random_crop(
    width: int,
    height: int,
    generator: np.random.Generator,
    scale: tuple[float, float] = CROP_SCALE,
    ratios: tuple[float, float] = CROP_RATIO,
) -> tuple[int, int, int, int]:
    """Return the left, upper, right and lower edge of a random crop of an image."""
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(math.log(ratios[0]), math.log(ratios[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    # For a very wide or very tall image: the largest center crop within the ratios.
    ratio = min(max(width / height, ratios[0]), ratios[1])
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


def _description(processor: Any) -> str:
    size, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
    sides = {name: value for name, value in size.items() if value is not None}
    cut = f"a center crop to {crop}" if getattr(processor, "do_center_crop", False) else "no center crop"
    hint = " (of SigLIP 2, take a checkpoint that is not NaFlex)" if hasattr(processor, "max_num_patches") else ""
    return f"{type(processor).__name__} with size {sides} and {cut}{hint}"


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
