"""The bundled emoji as images with names, and the training, dev and test sets made of them."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from index.files import InputError, atomic_folder
from index.records import read_records
from scripts import DATA

BUNDLED = DATA / "emoji"
NAMES_FILE = "emoji.jsonl.gz"
ARTISTS = ("google", "twitter")
TILE = 64
COLUMNS = 44

TEMPLATES = ("an emoji of {c}", "{c}", "emoji: {c}", "a small picture, {c}")
# Set: (artist, split of the concepts, task).
SETS = {
    "dev": ("google", "dev", "retrieval"),
    "dev-subgroups": ("google", "dev", "classification"),
    "held-out": ("google", "test", "retrieval"),
    "held-out-subgroups": ("google", "test", "classification"),
    "transfer": ("twitter", "train", "retrieval"),
    "transfer-subgroups": ("twitter", "train", "classification"),
    "held-out-transfer": ("twitter", "test", "retrieval"),
}


@dataclass(frozen=True)
class Emoji:
    """An emoji: its names, its groups, and the split of its concept."""

    id: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    concept: str
    split: str

    @property
    def key(self) -> str:
        """File name without extension: letters, digits and hyphens."""
        return f"{self.id}-{'-'.join(re.findall(r'[a-z0-9]+', self.name.lower()))}".rstrip("-")

    @property
    def captions(self) -> tuple[str, ...]:
        """The name, and the keywords if there are any besides the name."""
        others = [word for word in self.keywords if word.casefold() != self.name.casefold()]
        return (self.name, ", ".join(others)) if others else (self.name,)

    @property
    def class_name(self) -> str:
        """The sub-group with its group, because "other" or "with hats" alone say little."""
        return f"{self.subgroup} ({self.group})"


def read_emoji(folder: Path) -> list[Emoji]:
    """Read the emoji of the bundled folder, in the order of the tiles."""
    rows = [record.fields for record in read_records(folder / NAMES_FILE)]
    return [Emoji(**{**row, "keywords": tuple(row["keywords"])}) for row in rows]


def read_tiles(folder: Path, artist: str, count: int) -> list[bytes]:
    """The images of an artist as PNG bytes, in the order of the emoji.

    Raises:
        InputError: the sheet has another size.
    """
    path = folder / f"{artist}.webp"
    with Image.open(path) as sheet:
        expected = (COLUMNS * TILE, -(-count // COLUMNS) * TILE)
        if sheet.size != expected:
            raise InputError(f"{path}: expected {expected[0]} x {expected[1]} pixels, found {sheet.size}")
        whole = sheet.convert("RGB")
    return [_png(whole.crop(_box(number))) for number in range(count)]


def _box(number: int) -> tuple[int, int, int, int]:
    top, left = divmod(number, COLUMNS)
    return left * TILE, top * TILE, (left + 1) * TILE, (top + 1) * TILE


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sheet_of(images: Iterable[Image.Image], count: int) -> Image.Image:
    """Arrange images as tiles on a white sheet."""
    sheet = Image.new("RGB", (COLUMNS * TILE, -(-count // COLUMNS) * TILE), "white")
    for number, image in enumerate(images):
        sheet.paste(image, _box(number)[:2], image if image.mode == "RGBA" else None)
    return sheet


def unpack(bundled: Path, out: Path) -> None:
    """Write the training tar, the sets of SETS in CLIP_benchmark's layout, every image as a file, and the names.

        OUT/train/00000.tar     KEY.png with KEY.txt (the name) and KEY.json (name, keywords, captions): Google's images
        OUT/SET/…               sets for `retriever evaluate zero-shot`
        OUT/images/ARTIST/      all images
        OUT/names.jsonl         every name with its keywords, as a corpus to search by image

    Raises:
        InputError: a bundled file is missing or has another size, or `out` contains other files.
    """
    ours = {"train", "images", "names.jsonl", *SETS}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - ours):
        raise InputError(f"{out}: expected a new folder or one that this script wrote, found other files")
    emoji = read_emoji(bundled)
    tiles = {artist: read_tiles(bundled, artist, len(emoji)) for artist in ARTISTS}
    with atomic_folder(out) as folder:
        trained = [(one, png) for one, png in zip(emoji, tiles["google"], strict=True) if one.split == "train"]
        write_tar(folder / "train" / "00000.tar", _pairs(trained))
        classes = list(dict.fromkeys(one.class_name for one in emoji))
        for name, (artist, split, task) in SETS.items():
            some = [(one, png) for one, png in zip(emoji, tiles[artist], strict=True) if one.split == split]
            _write_set(folder / name, some, classes if task == "classification" else None)
        named = (json.dumps({"_id": one.key, "text": ": ".join(one.captions)}, ensure_ascii=False) for one in emoji)
        (folder / "names.jsonl").write_text("".join(f"{line}\n" for line in named), encoding="utf-8")
        for artist, drawn in tiles.items():
            (folder / "images" / artist).mkdir(parents=True)
            for one, png in zip(emoji, drawn, strict=True):
                (folder / "images" / artist / f"{one.key}.png").write_bytes(png)


def _pairs(drawn: Iterable[tuple[Emoji, bytes]]) -> Iterator[tuple[str, bytes]]:
    for one, png in drawn:
        captions = [*one.captions, *(f"{one.name}: {words}" for words in one.captions[1:])]
        about = {"name": one.name, "keywords": list(one.keywords), "captions": captions}
        yield f"{one.key}.png", png
        yield f"{one.key}.txt", one.name.encode()
        yield f"{one.key}.json", json.dumps(about, ensure_ascii=False).encode()


def _write_set(folder: Path, drawn: list[tuple[Emoji, bytes]], classes: list[str] | None) -> None:
    def members() -> Iterator[tuple[str, bytes]]:
        for one, png in drawn:
            yield f"{one.key}.png", png
            if classes is None:
                yield f"{one.key}.txt", "\n".join(one.captions).encode()
            else:
                yield f"{one.key}.cls", str(classes.index(one.class_name)).encode()

    write_tar(folder / "test" / "0.tar", members())
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "dataset_type.txt").write_text("retrieval\n" if classes is None else "classification\n")
    if classes is not None:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        lines = "".join(f"{template}\n" for template in TEMPLATES)
        (folder / "zeroshot_classification_templates.txt").write_text(lines)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar without times, owners or permissions, so that equal members give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def names_file(emoji: Iterable[Emoji]) -> bytes:
    """Content of NAMES_FILE: JSON lines, compressed without time or name."""
    lines = "".join(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in emoji)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
        stream.write(lines.encode())
    return buffer.getvalue()
