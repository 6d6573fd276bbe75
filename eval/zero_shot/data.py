"""Image sets to be judged on: what a sample is, and which layout a path holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.files import InputError
from index.image_files import ImageAt
from index.records import open_text

Task = Literal["classification", "multilabel", "retrieval"]

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"
SPLITS = ("train", "val", "valid", "validation", "dev", "test")
OWN_TEMPLATES = Path(__file__).resolve().parent.parent / "reports" / "templates" / "prompts.txt"


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with what is known of it."""

    image: ImageAt
    labels: tuple[int, ...] = ()
    """Numbers of its classes: one, or any number where the task is multilabel."""
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class ZeroShotSet:
    """A set of images with classes or captions."""

    name: str
    path: Path
    layout: Literal["folder", "webdataset", "table"]
    task: Task
    samples: list[Sample]
    """Every image, in the order of the set."""
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    """Prompts for a class, with {c} or {} for its name; those of the project where the set has none."""
    own_templates: bool = False
    """Whether the prompts came with the set."""

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """Of all that a score depends on: images, labels, captions, classes and prompts."""
        digest = hashlib.sha256(json.dumps([self.task, self.classes, self.templates]).encode())
        for sample in self.samples:
            known = json.dumps([sample.image.name, sample.labels, sample.captions])
            digest.update(f"{known}{hashlib.sha256(sample.image.read()).hexdigest()}".encode())
            if progress is not None:
                progress(1)
        return digest.hexdigest()


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file, without white space around them, up to the last that holds any.

    Raises:
        InputError: it is missing, no UTF-8, empty, or a line within it is.
    """
    with open_text(path) as stream:
        try:
            lines = [line.strip() for line in stream.read().rstrip().splitlines()]
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: expected UTF-8, found: {error}") from None
    if not any(lines):
        raise InputError(f"{path}: expected a line or more, found none")
    for number, line in enumerate(lines, start=1):
        if not line:
            raise InputError(f"{path}:{number}: expected text, found an empty line")
    return tuple(lines)


def read_templates(path: Path) -> tuple[str, ...]:
    """Prompts, one a line, each with {c} or {} where the name of the class stands.

    Raises:
        InputError: as `read_lines`, or a line has no place for the name.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if "{c}" not in line and "{}" not in line:
            raise InputError(f"{path}:{number}: expected a prompt with {{c}} in it, found {line!r:.60}")
    return lines


def templates_of(*folders: Path) -> tuple[tuple[str, ...], bool]:
    """The prompts that lie in the first of some folders that has any, or the project's; and whether they are the set's.

    Raises:
        InputError: as `read_templates`.
    """
    own = first_file(folders, TEMPLATES)
    return (read_templates(OWN_TEMPLATES), False) if own is None else (read_templates(own), True)


def first_file(folders: Iterable[Path], name: str) -> Path | None:
    """The file of this name in the first of some folders that has one."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
