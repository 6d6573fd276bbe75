"""Image sets for zero-shot evaluation: samples, classes and prompt templates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from index.files import InputError, parse_json
from index.image_files.classes import is_template, prompt_of, read_prompts, read_templates
from index.image_files.folders import StoredImage
from index.records import open_text

Task = Literal["classification", "multilabel", "retrieval"]

DATASET_TYPE = "dataset_type.txt"
SPLITS = ("train", "val", "valid", "validation", "dev", "test")
DEFAULT_TEMPLATES = Path(__file__).resolve().parent.parent / "reports" / "templates" / "prompts.txt"


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with its labels or captions."""

    image: StoredImage
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
    """The first name of each class."""
    templates: tuple[str, ...] = ()
    """Prompt templates with {c} or {} for the class name; the default templates if the set has none."""
    own_templates: bool = False
    """Whether the templates belong to the set."""
    other_names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Further names of classes, by class index."""
    class_prompts: tuple[tuple[str, ...], ...] = ()
    """Whole prompts of each class, instead of templates (CuPL, arXiv 2209.03320)."""
    notices: tuple[str, ...] = ()
    """One line for each kind of file that was ignored."""

    @property
    def prompts(self) -> list[list[str]]:
        """The prompts of each class: every template with every name of the class, or the class's own prompts."""
        if self.class_prompts:
            return [list(own) for own in self.class_prompts]
        names = ((name, *self.other_names.get(number, ())) for number, name in enumerate(self.classes))
        return [[prompt_of(template, name) for name in own for template in self.templates] for own in names]

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """Hash of everything that the metrics depend on: images, labels, captions, classes and templates."""
        known: list[object] = [self.task, self.classes, self.templates]
        # Sets without these keep the hashes that they had before.
        known += [self.prompts] if self.class_prompts or self.other_names else []
        digest = hashlib.sha256(json.dumps(known).encode())
        for sample in self.samples:
            about = json.dumps([sample.image.name, sample.labels, sample.captions])
            digest.update(f"{about}{hashlib.sha256(sample.image.read()).hexdigest()}".encode())
            if progress is not None:
                progress(1)
        return digest.hexdigest()


def templates_of(*folders: Path) -> tuple[tuple[str, ...], bool]:
    """The templates from the first folder that has some, and True; otherwise the default templates, and False.

    Raises:
        InputError: see `read_templates`.
    """
    own = read_prompts(folders)
    return (own, True) if own else (read_templates(DEFAULT_TEMPLATES), False)


def with_prompts(dataset: ZeroShotSet, path: Path) -> ZeroShotSet:
    """Return the set with the prompts of a file instead of its own.

    Args:
        dataset: A set with classes.
        path: Templates, one per line with {c} for the class name; or a .json file with the prompts of each class,
            {"class name": ["prompt", …]}, as CuPL publishes them. A class is found by any of its names. Of these
            prompts, those with {c} are filled in.

    Raises:
        InputError: The file cannot be read, or lacks a class.
    """
    if path.suffix != ".json":
        return replace(dataset, templates=read_templates(path), own_templates=False, class_prompts=())
    with open_text(path) as stream:
        try:
            given = parse_json(stream.read(), str(path))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: expected UTF-8, found: {error}") from None
    if not isinstance(given, dict):
        raise InputError(f"{path}: expected an object of class names and their prompts, found {type(given).__name__}")
    for name, own in given.items():
        if not (isinstance(own, list) and own and all(isinstance(text, str) and text.strip() for text in own)):
            raise InputError(f"{path}: {name}: expected a list of prompts, found {own!r:.60}")
    prompts = []
    for number, name in enumerate(dataset.classes):
        names = (name, *dataset.other_names.get(number, ()))
        key = next((each for each in names if each in given), None)
        if key is None:
            raise InputError(f"{path}: expected prompts of the class {name!r} of {dataset.name}, found none")
        prompts.append(tuple(prompt_of(text, name) if is_template(text) else text for text in given[key]))
    return replace(dataset, templates=(), own_templates=False, class_prompts=tuple(prompts))
