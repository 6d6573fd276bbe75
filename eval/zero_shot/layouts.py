"""Image sets in folders: one subfolder per class, or webdataset tars in CLIP_benchmark's layout."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.zero_shot.data import DATASET_TYPE, Sample, Task, ZeroShotSet, templates_of
from index.files import InputError
from index.image_files.classes import CLASS_NAMES, class_folders, first_file, read_class_names, read_lines
from index.image_files.folders import IMAGE_EXTENSIONS, IMAGES, ImageAt
from index.image_files.tars import visible_samples

# Larger members cannot be labels or captions.
MAX_MEMBER_BYTES = 2**24

TASKS: dict[str, tuple[Task, str]] = {
    "classification": ("classification", "cls"),
    "multilabel": ("multilabel", "npy"),
    "retrieval": ("retrieval", "txt"),
}


def open_image_folder(path: Path, base: Path) -> ZeroShotSet:
    """Read BASE/CLASS/….jpg. The classes are the folders in order of name; classnames.txt may rename them.

    Raises:
        InputError: there are no folders, a folder has no image, or classnames.txt has another number of lines.
    """
    found = class_folders(base, path)
    samples = [
        Sample(ImageAt(file, file.relative_to(base).as_posix()), labels=(label,))
        for label, files in enumerate(found.files)
        for file in files
    ]
    templates, own = templates_of(path, base)
    return ZeroShotSet(
        _name(path),
        path,
        "folder",
        "classification",
        samples,
        **names_of(found.names),
        templates=templates,
        own_templates=own,
        notices=tuple(found.notices),
    )


def names_of(names: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """The fields of a set for the names of its classes."""
    other = {number: own[1:] for number, own in enumerate(names) if own[1:]}
    return {"classes": tuple(own[0] for own in names), "other_names": other}


def open_webdataset(path: Path, base: Path) -> ZeroShotSet:
    """Read PATH/SPLIT/{0,1,…}.tar of KEY.jpg (or png, …) with KEY.cls, KEY.npy or KEY.txt, as CLIP_benchmark does.

    dataset_type.txt gives the task: classification (the default; KEY.cls is a 0-based line number of classnames.txt),
    multilabel (KEY.npy is a vector of 0 and 1) or retrieval (KEY.txt has one caption per line).

    Raises:
        InputError: a file that describes the set is missing or invalid, or a tar is missing.
    """
    kind = "classification"
    if (described := _description_file(path, base, DATASET_TYPE)) is not None:
        (kind,) = read_lines(described)[:1]
        if kind.lower() not in TASKS:
            raise InputError(f"{described}:1: expected {', '.join(TASKS)}, found {kind!r:.60}")
    task, label = TASKS[kind.lower()]
    shards = _shards(base)
    if task == "retrieval":
        samples = [Sample(at, captions=_captions(text, place)) for at, text, place in _members(shards, base, label)]
        return ZeroShotSet(_name(path), path, "webdataset", task, samples)
    names = _description_file(path, base, CLASS_NAMES)
    if names is None:
        raise InputError(
            f"{path / CLASS_NAMES}: no such file; expected the name of a class on each line, or, for images with "
            f"captions, {DATASET_TYPE} with the word retrieval"
        )
    classes = read_class_names(names)
    read: Callable[[bytes, str, int], tuple[int, ...]] = _class_index if task == "classification" else _multi_hot
    members = _members(shards, base, label)
    samples = [Sample(image, labels=read(text, place, len(classes))) for image, text, place in members]
    templates, own = templates_of(path, base)
    return ZeroShotSet(
        _name(path),
        path,
        "webdataset",
        task,
        samples,
        **names_of(classes),
        templates=templates,
        own_templates=own,
    )


def _shards(base: Path) -> list[Path]:
    listed = base / "nshards.txt"
    if not listed.is_file():
        return sorted(
            base.glob("*.tar"), key=lambda path: [int(p) if p.isdigit() else p for p in _split_digits(path.name)]
        )
    text = read_lines(listed)[0]
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 10**6):
        raise InputError(f"{listed}:1: expected the number of tars, found {text!r:.60}")
    shards = [base / f"{number}.tar" for number in range(int(text))]
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{shard}: no such file; expected {text} tars, as {listed.name} says")
    return shards


def _split_digits(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _members(shards: list[Path], base: Path, label: str) -> Iterator[tuple[ImageAt, bytes, str]]:
    """Yield (image, content of the member with extension `label`, location for errors) of each sample."""
    for shard in shards:
        name = shard.relative_to(base).as_posix()
        for key, members in visible_samples(shard):
            place = f"{shard}: {key}"
            image = next((members[kind] for kind in IMAGE_EXTENSIONS if kind in members), None)
            if image is None or label not in members:
                wanted = f".{label}" if image is not None else f"{', '.join(IMAGES[:8])}, …"
                found = ", ".join(f".{kind}" for kind in members)
                dotted = any("." in kind for kind in members)
                hint = "; a name has a dot before its extension, which ends the key of a sample" if dotted else ""
                raise InputError(f"{place}: expected a member {wanted}, found {found:.200}{hint}")
            entry = members[label]
            if entry.size > MAX_MEMBER_BYTES:
                raise InputError(f"{place}.{label}: expected at most {MAX_MEMBER_BYTES} bytes, found {entry.size}")
            text = ImageAt(shard, "", entry.offset, entry.size).read()
            yield ImageAt(shard, f"{name}/{image.name}", image.offset, image.size), text, f"{place}.{label}"


def _class_index(content: bytes, place: str, classes: int) -> tuple[int, ...]:
    text = content.decode("utf-8-sig", "replace").strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < classes):
        raise InputError(f"{place}: expected a number from 0 to {classes - 1}, found {text!r:.60}")
    return (int(text),)


def _multi_hot(content: bytes, place: str, classes: int) -> tuple[int, ...]:
    try:
        # np.load would also accept an archive of arrays.
        values = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise InputError(f"{place}: expected an array in npy format, found: {error}") from None
    if values.shape != (classes,) or not np.isin(values, (0, 1)).all():
        raise InputError(f"{place}: expected {classes} values of 0 or 1, found {values.dtype} {values.shape}")
    return tuple(np.flatnonzero(values).tolist())


def _captions(content: bytes, place: str) -> tuple[str, ...]:
    try:
        # A byte order mark is not part of a caption.
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: expected UTF-8, found: {error}") from None
    return tuple(line.strip() for line in lines if line.strip())


def _description_file(path: Path, base: Path, name: str) -> Path | None:
    """A file that describes the set, from its folder or the folder of the split."""
    return first_file((path, base), name)


def _name(path: Path) -> str:
    return path.resolve().name
