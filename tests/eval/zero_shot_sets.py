"""Small image sets in the three layouts, and embedding functions without a model."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}


def image_bytes(color: tuple[int, int, int], shade: int = 0, kind: str = "PNG") -> bytes:
    """The encoded file of an image of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), tuple(max(0, value - shade) for value in color)).save(buffer, kind)
    return buffer.getvalue()


def write_folder(folder: Path, each: int = 3) -> Path:
    """FOLDER/COLOR/N.png."""
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            (folder / name / f"{number}.png").write_bytes(image_bytes(color, 4 * number))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """Write a tar with these members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_webdataset(folder: Path, kind: str = "classification", each: int = 3) -> Path:
    """Write the same images as a webdataset of two tars with JPEG, PNG and WebP members."""
    kinds = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))
    tars: list[dict[str, bytes | str]] = [{}, {}]
    number = 0
    for label, (name, color) in enumerate(COLORS.items()):
        for shade in range(each):
            encoder, suffix = kinds[number % 3]
            members, key = tars[number % 2], f"s{number:07d}"
            members[f"{key}.{suffix}"] = image_bytes(color, 4 * shade, encoder)
            if kind == "classification":
                members[f"{key}.cls"] = str(label)
            elif kind == "multilabel":
                buffer = io.BytesIO()
                np.save(buffer, np.eye(len(COLORS), dtype=np.int64)[label])
                members[f"{key}.npy"] = buffer.getvalue()
            else:
                members[f"{key}.txt"] = f"{name} {shade}\nall {name}\n"
            number += 1
    for place, members in enumerate(tars):
        write_tar(folder / "test" / f"{place}.tar", members)
    (folder / "test" / "nshards.txt").write_text("2\n")
    if kind != "classification":
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in COLORS))
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n{c}\n")
    return folder


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def unit(rows: np.ndarray) -> np.ndarray:
    """Normalize rows, float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def embed_images(images: Sequence) -> tuple[np.ndarray, dict[int, str]]:
    """Embed images as their mean color."""
    vectors, broken = np.ones((len(images), 3)), {}
    for row, image in enumerate(images):
        try:
            with Image.open(io.BytesIO(image.read())) as opened:
                vectors[row] = np.asarray(opened.convert("RGB"), dtype=float).mean(axis=(0, 1))
        except OSError:
            broken[row] = "not an image"
    return unit(vectors), broken


def embed_texts(texts: Sequence[str]) -> np.ndarray:
    """Embed a text as the color it names, with a small offset by its length."""
    rows = []
    for text in texts:
        color = next((COLORS[word] for word in text.split() if word in COLORS), (1, 1, 1))
        rows.append(np.array(color, dtype=float) + len(text) % 3)
    return unit(np.array(rows))
