"""Decoding image files to RGB, with Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from index.files import InputError, check_readable

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused before they are decoded. Pillow's limit; a quarter of a GiB as RGB."""

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

# Pillow's raw modes of PNG files with other than 8 bits per sample, and the factor from samples to Pillow's values.
# Pillow scales the samples, but not the color that a PNG file marks as transparent.
_SAMPLE_FACTORS = {"1": 255.0, "L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}

# Pillow opens 16-bit files of these formats in a 32-bit mode.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


def open_image(source: Image.Image | Path | str | bytes, location: str = "image") -> Image.Image:
    """Decode an image to RGB. It is rotated according to its EXIF data; transparent pixels are put on white.

    Of an animation it is the first frame. Gray images of 16 bits are scaled to 8 bits. Values of 32-bit gray images are
    taken as 8 bits if none is above 255, and otherwise as 16 bits. Color profiles are ignored, as in transformers.

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
    if image.mode == "RGB" and "transparency" not in image.info:
        upright = _upright(image)
        # Not copied unless it is rotated or the caller's; a copy takes a tenth of the time of decoding.
        return image.copy() if upright is image and not own else upright
    # Loading the image clears its format and tiles.
    sixteen_bits, transparent = image.format in _SIXTEEN_BIT_FORMATS, _transparent_value(image)
    rotated = _upright(image)
    if transparent is not None:
        rotated = rotated if own else rotated.copy()
        rotated.info["transparency"] = transparent
    if rotated.mode in ("I", "F") or rotated.mode.startswith("I;16"):
        return _gray_to_rgb(rotated, location, sixteen_bits or rotated.mode.startswith("I;16"))
    if rotated.has_transparency_data:
        if rotated.mode == "La":
            # Pillow cannot convert it to RGBA.
            rotated = rotated.convert("LA")
        white = Image.new("RGBA", rotated.size, "white")
        return Image.alpha_composite(white, rotated.convert("RGBA")).convert("RGB")
    return rotated.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Return the image rotated according to its EXIF data; `image` itself if it is not rotated."""
    # Errors of the pixels are raised here.
    image.load()
    try:
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except _BROKEN:
        # Damaged EXIF data says nothing about the pixels. Browsers ignore it, too.
        return image
    return ImageOps.exif_transpose(image) if rotated else image


def _transparent_value(image: Image.Image) -> int | tuple[int, ...] | None:
    """Return the transparent color of a PNG in units of the decoded pixels; None if Pillow's is right."""
    value = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    raw_mode = tiles[0][3] if tiles else image.mode
    factor = _SAMPLE_FACTORS.get(raw_mode[0] if isinstance(raw_mode, tuple) else raw_mode)
    if factor is None:
        return None
    if isinstance(value, int):
        return int(value * factor)
    return tuple(int(part * factor) for part in value) if isinstance(value, tuple) else None


def _gray_to_rgb(image: Image.Image, location: str, sixteen_bits: bool) -> Image.Image:
    # Pillow clips values above 255, which would turn 16-bit gray into white.
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError(f"{location}: expected an image of at most 16 bits per channel, found mode {image.mode}")
    shades = (values >> 8 if sixteen_bits or values.max() > 255 else values).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        shades[values == transparent] = 255
    return Image.fromarray(shades).convert("RGB")
