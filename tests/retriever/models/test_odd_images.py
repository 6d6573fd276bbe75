"""Odd images get the pixels of transformers' Pillow path, or are refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_helpers import noise
from PIL import Image

from index.files import InputError
from retriever.models.images.transforms import ImageTransform, open_image

GRADIENT = np.linspace(0, 255, 20 * 30).astype(np.uint8).reshape(20, 30)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, depth: int, color: int, row: bytes, *chunks: bytes) -> bytes:
    """A PNG of one row, of a bit depth that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data


def transparent(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def as_transformers_loads() -> dict[str, bytes]:
    """Upright or rotated, opaque images of at most 8 bits per channel."""
    rgb, gray = noise(30, 20), Image.fromarray(GRADIENT)
    modes = {
        "PNG": "1 L P RGB",
        "JPEG": "L RGB CMYK",
        "TIFF": "CMYK LAB YCbCr",
        "GIF": "P",
        "BMP": "L",
        "PPM": "RGB 1",
        **dict.fromkeys(("WEBP", "JPEG2000", "TGA", "AVIF", "QOI"), "RGB"),
    }
    cases = {
        f"{mode} in {kind}": encoded(rgb.convert(mode), kind) for kind, own in modes.items() for mode in own.split()
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases[f"EXIF {orientation}"] = encoded(rgb, "JPEG", exif=exif)
    frames = [noise(30, 20, seed) for seed in (5, 6)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        cases[f"animated {kind}"] = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    for size in ((1, 1), (1, 30), (30, 1), (2, 2), (33, 32)):
        cases[f"{size}"] = encoded(noise(*size), "PNG")
    cases["4 bits"] = png(2, 4, 0, b"\x3c")
    cases["progressive"] = encoded(rgb, "JPEG", progressive=True)
    cases["color profile"] = encoded(gray, "PNG", icc_profile=b"not a profile")
    return cases


def test_pixels_equal_those_that_transformers_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.image_utils import load_image

    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, rescale_factor=1 / 127.5
    )
    transform = ImageTransform.of_processor(processor)
    cases = as_transformers_loads()
    assert len(cases) >= 38
    for name, content in cases.items():
        (tmp_path / "image").write_bytes(content)
        expected = processor(images=[load_image(str(tmp_path / "image"))], return_tensors="np")["pixel_values"][0]
        for source in (content, tmp_path / "image", Image.open(tmp_path / "image")):
            np.testing.assert_allclose(transform(open_image(source)).numpy(), expected, atol=2e-6, err_msg=name)


def test_transparent_pixels_of_every_kind_are_white() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    dark = Image.new("RGB", (2, 1))
    dark.putpixel((0, 0), (10, 20, 30))
    palette = dark.quantize(2)
    cases: dict[str, bytes | Image.Image] = {
        "RGBA": encoded(clear, "PNG"),
        "WebP": encoded(clear, "WEBP", lossless=True),
        "LA": encoded(clear.convert("LA"), "PNG"),
        "La": clear.convert("LA").convert("La"),
        "RGBa": clear.convert("RGBa"),
        "RGB": encoded(dark, "PNG", transparency=(0, 0, 0)),
        "L": encoded(dark.convert("L"), "PNG", transparency=0),
        "P": encoded(palette, "PNG", transparency=palette.getpixel((1, 0))),
        "GIF": encoded(palette, "GIF", transparency=palette.getpixel((1, 0))),
        "1 bit": png(2, 1, 0, b"\x40", transparent(1)),
        "2 bits": png(2, 2, 0, b"\x60", transparent(2)),
        "4 bits": png(2, 4, 0, b"\x35", transparent(5)),
        "16 bits": png(2, 16, 0, struct.pack(">HH", 3000, 500), transparent(500)),
        "3 x 16 bits": png(2, 16, 2, struct.pack(">6H", 1, 2, 3, 4000, 5000, 6000), transparent(4000, 5000, 6000)),
    }
    for name, source in cases.items():
        image = open_image(source)
        assert image.getpixel((1, 0)) == (255, 255, 255), name
        assert max(image.getpixel((0, 0))) < 90, name


def test_gray_images_of_more_bits_keep_their_shades() -> None:
    wide = GRADIENT.astype(np.uint16) * 257
    cases: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
        "16-bit PNG": (lambda: encoded(Image.fromarray(wide), "PNG"), GRADIENT),
        "16-bit TIFF": (lambda: encoded(Image.fromarray(wide), "TIFF"), GRADIENT),
        "dark 16-bit PNG": (lambda: encoded(Image.fromarray(wide >> 8), "PNG"), np.zeros_like(GRADIENT)),
        "16-bit PGM": (lambda: b"P5 30 20 65535\n" + wide.astype(">u2").tobytes(), GRADIENT),
        "dark PGM": (lambda: b"P5 30 20 65535\n" + (wide >> 8).astype(">u2").tobytes(), np.zeros_like(GRADIENT)),
        "32 bits of 8": (lambda: encoded(Image.fromarray(GRADIENT.astype(np.int32)), "TIFF"), GRADIENT),
        "32 bits of 16": (lambda: encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"), GRADIENT),
    }
    for name, (content, expected) in cases.items():
        assert np.array_equal(np.asarray(open_image(content()))[..., 0], expected), name


def test_damaged_exif_data_leave_an_image_as_it_is_and_other_damage_is_refused() -> None:
    whole = encoded(noise(30, 20), "PNG")
    image = open_image(whole[:33] + chunk(b"eXIf", b"no TIFF at all") + whole[33:])
    assert image.tobytes() == noise(30, 20).tobytes()
    for content in (whole[:200], b"GIF89a", Image.MIME["PNG"].encode()):
        with pytest.raises(InputError, match="a/b: expected an image"):
            open_image(content, "a/b")


def test_processors_that_do_something_else_are_refused_by_name() -> None:
    transformers = pytest.importorskip("transformers")
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    uncropped = transformers.CLIPImageProcessor(**sides, do_center_crop=False)
    with pytest.raises(InputError, match=r"m: expected .* center-crops, found CLIPImage\w+ with .* 32\} and no center"):
        ImageTransform.of_processor(uncropped, "m")
    with pytest.raises(InputError, match=r"m: expected an image processor that only resizes, .*test image differs"):
        ImageTransform.of_processor(Swapped(transformers.CLIPImageProcessor(**sides)), "m")
    unscaled = transformers.CLIPImageProcessor(**sides, do_rescale=False, do_normalize=False)
    assert ImageTransform.of_processor(unscaled)(noise(32, 32)).max() > 200


class Swapped:
    """A processor with a setting that is not read: blue, green and red instead of red, green and blue."""

    def __init__(self, processor: object) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> object:
        return getattr(self._processor, name)

    def __call__(self, **arguments: object) -> dict[str, np.ndarray]:
        return {"pixel_values": np.asarray(self._processor(**arguments)["pixel_values"])[:, ::-1]}
