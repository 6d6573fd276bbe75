"""Transforms give the pixels of transformers' processors; files that are not images are refused by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from image_helpers import draw, noise
from PIL import Image

import retriever.models.images.decoding as decoding
import retriever.models.images.transforms as transforms
from index.files import InputError
from retriever.models.images.transforms import ImageTransform, open_image, random_crop


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (32, 32), (33, 97), (5, 200)])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor"])
def test_pixels_equal_those_of_transformers_processors(kind: str, size: tuple[int, int]) -> None:
    import transformers

    exact = {"height": 32, "width": 24} if kind == "SiglipImageProcessor" else {"shortest_edge": 40}
    crop = {} if kind == "SiglipImageProcessor" else {"crop_size": {"height": 32, "width": 32}}
    processor = getattr(transformers, kind)(size=exact, **crop)
    image = noise(*size)
    theirs = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    ours = ImageTransform.of_processor(processor)(image)
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_random_crops_are_within_scale_and_ratio_and_reproducible() -> None:
    generator = np.random.default_rng(0)
    boxes = np.array([random_crop(200, 100, generator) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 200).all() and (boxes[:, 3] <= 100).all()
    share = width * height / 20000
    assert 0.07 < share.min() < 0.12 and 0.5 < share.max() <= 1
    ratio = width / height
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    long = random_crop(1000, 10, generator)
    assert long[3] - long[1] == 10 and long[2] - long[0] == 13
    transform = ImageTransform((32, 32), flip=True)
    image = noise(60, 50)
    first, again, other = (transform.augment(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.uint8 and first.shape == (3, 32, 32)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_crops_and_colors_change_within_their_settings() -> None:
    generator = np.random.default_rng(0)
    boxes = np.array([random_crop(200, 100, generator, (0.9, 1.0), (1.5, 2.5)) for _ in range(200)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (width * height / 20000).min() > 0.88 and (width / height).min() > 1.45
    image = Image.new("RGB", (40, 40), (120, 100, 80))
    plain, strong = ImageTransform((32, 32)), ImageTransform((32, 32), jitter=0.4)
    assert np.ptp([plain.augment(image, generator).float().mean() for _ in range(20)]) == 0
    means = [float(strong.augment(image, generator).float().mean()) for _ in range(100)]
    # 100 times 0.6 and 1.4, but for rounding.
    assert 57 <= min(means) < 75 and 125 < max(means) <= 143
    again = [strong.augment(image, np.random.default_rng(seed)) for seed in (1, 1)]
    assert torch.equal(*again)
    # Stores and indexes of earlier versions name models by this.
    assert list(strong.identity()) == ["size", "resize", "resample", "mean", "std", "flip"]


def test_half_of_the_images_are_flipped_if_requested() -> None:
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (16, 0, 32, 32))

    def left_is_white(flip: bool) -> float:
        generator = np.random.default_rng(0)
        pixels = [ImageTransform((32, 32), flip=flip).augment(image, generator) for _ in range(300)]
        return float(np.mean([p[:, :, 0].float().mean() > p[:, :, -1].float().mean() for p in pixels]))

    assert left_is_white(False) == 0 and 0.3 < left_is_white(True) < 0.6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16"])
def test_images_of_every_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    source = Image.new("I;16", (9, 7)) if mode == "I;16" else draw("red", "circle").convert(mode)
    path = saved(source, tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    image = open_image(path)
    assert image.mode == "RGB" and image.size == source.size


def test_sixteen_bits_of_grey_keep_their_shades_and_unknown_ranges_are_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = open_image(saved(Image.fromarray(ramp), tmp_path / "a.png"))
    assert np.array_equal(np.asarray(image)[..., 1], ramp // 256)
    for number, values in enumerate((np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32))):
        path = saved(Image.fromarray(values), tmp_path / f"{number}.tif")
        with pytest.raises(InputError, match=rf"{number}\.tif: expected an image of at most 16 bits"):
            open_image(path)


@pytest.mark.parametrize("size", [(65535, 1), (1, 65535), (4000, 3)])
def test_very_long_images_are_center_cropped_before_resizing(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", size, "red")
    center = tuple(side // 2 for side in size)
    image.paste("blue", (max(0, center[0] - 40), max(0, center[1] - 40), center[0] + 40, center[1] + 40))
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *options: made.append(to) or resize(self, to, *options))
    pixels = ImageTransform((224, 224)).pixels(image)
    assert pixels.shape == (3, 224, 224) and (pixels[2] == 255).all() and not pixels[0].any()
    assert max(made[0]) <= 224 * transforms.MAX_ASPECT


def test_transparency_becomes_white_and_exif_rotation_is_applied(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(saved(clear, tmp_path / "a.png")).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(saved(Image.new("RGB", (8, 4)), tmp_path / "b.jpg", exif=exif)).size == (4, 8)


def test_damaged_files_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = io.BytesIO()
    noise(200, 200).save(whole, "JPEG")
    cases = {"cut.jpg": whole.getvalue()[:2000], "text.png": b"no image", "empty.webp": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: expected an image"):
            open_image(tmp_path / name)
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(InputError, match=r"shard\.tar/3: expected an image"):
        open_image(b"nothing", "shard.tar/3")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    with pytest.raises(InputError, match=r"bomb\.png: expected an image of at most 100 pixels, found 20 x 10"):
        open_image(saved(noise(20, 10), tmp_path / "bomb.png"))


def test_pillows_decompression_bomb_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(InputError, match=r"bomb\.png: expected an image, found one that cannot be read: .*bomb"):
        open_image(saved(noise(20, 10), tmp_path / "bomb.png"))
