"""Image sets for zero-shot evaluation: samples, classes and prompt templates."""

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
DEFAULT_TEMPLATES = Path(__file__).resolve().parent.parent / "reports" / "templates" / "prompts.txt"


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with its labels or captions."""

    image: ImageAt
    labels: tuple[int, ...] = ()
    """Class indices: exactly one, or any number if the task is multilabel."""
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class ZeroShotSet:
    """A set of images with classes or captions."""

    name: str
    path: Path
    layout: Literal["folder", "webdataset", "table"]
    task: Task
    samples: list[Sample]
    """All images, in the order of the set."""
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    """Prompt templates with {c} or {} for the class name; the default templates if the set has none."""
    own_templates: bool = False
    """Whether the templates belong to the set."""

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """Hash of everything that the metrics depend on: images, labels, captions, classes and templates."""
        digest = hashlib.sha256(json.dumps([self.task, self.classes, self.templates]).encode())
        for sample in self.samples:
            known = json.dumps([sample.image.name, sample.labels, sample.captions])
            digest.update(f"{known}{hashlib.sha256(sample.image.read()).hexdigest()}".encode())
            if progress is not None:
                progress(1)
        return digest.hexdigest()


def read_lines(path: Path) -> tuple[str, ...]:
    """Read the stripped lines of a text file; empty lines at the end are ignored.

    Raises:
        InputError: the file is missing, not UTF-8 or empty, or has an empty line before the last text.
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
    """Read prompt templates, one per line, each with {c} or {} for the class name.

    Raises:
        InputError: see `read_lines`; or a line contains neither {c} nor {}.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if "{c}" not in line and "{}" not in line:
            raise InputError(f"{path}:{number}: expected a prompt with {{c}} in it, found {line!r:.60}")
    return lines


def templates_of(*folders: Path) -> tuple[tuple[str, ...], bool]:
    """The templates from the first folder that has some, and True; otherwise the default templates, and False.

    Raises:
        InputError: see `read_templates`.
    """
    own = first_file(folders, TEMPLATES)
    return (read_templates(DEFAULT_TEMPLATES), False) if own is None else (read_templates(own), True)


def first_file(folders: Iterable[Path], name: str) -> Path | None:
    """The path of the file `name` in the first folder that has it; None if there is none."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
