"""Classes of images: a folder for each, their names, and prompts for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from index.files import InputError
from index.image_files.folders import IMAGES, is_hidden, list_image_folder
from index.records import open_text

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
NAME_SEPARATOR = "|"
"""Separates several names of a class in classnames.txt."""


@dataclass(frozen=True)
class ClassFolders:
    """A folder with a folder of images for each class."""

    names: list[tuple[str, ...]]
    """The names of each class, at least one."""
    files: list[list[Path]]
    """The images of each class."""
    notices: list[str]
    """One line for each kind of file that was ignored."""


def class_folders(base: Path, *others: Path) -> ClassFolders:
    """List BASE/CLASS/….jpg. The classes are the folders in order of name; classnames.txt may rename them.

    Args:
        base: The folder.
        others: Folders in which classnames.txt is looked for before `base`.

    Raises:
        InputError: There are no folders, a folder has no image, or classnames.txt has another number of lines.
    """
    entries = sorted(entry for entry in base.iterdir() if not is_hidden(entry.name))
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        raise InputError(f"{base}: expected .tar files, or a folder of images for each class, found neither")
    listed = [list_image_folder(folder) for folder in folders]
    for folder, found in zip(folders, listed, strict=True):
        if not found.files:
            raise InputError(f"{folder}: expected images ({', '.join(IMAGES[:8])}, …), found none")
    names: list[tuple[str, ...]] = [(folder.name.replace("_", " "),) for folder in folders]
    if (file := first_file((*others, base), CLASS_NAMES)) is not None:
        names = read_class_names(file)
        if len(names) != len(folders):
            raise InputError(f"{file}: expected a line for each of {len(folders)} folders, found {len(names)}")
    notices = [
        f"{folder.name}: {line}" for folder, found in zip(folders, listed, strict=True) for line in found.notices
    ]
    outside = [entry for entry in entries if entry.suffix.lower() in IMAGES and not entry.is_dir()]
    if outside:
        notices.append(f"images ignored that are in no class folder: {len(outside):,} (first {outside[0].name})")
    return ClassFolders(names, [found.files for found in listed], notices)


def read_class_names(path: Path) -> list[tuple[str, ...]]:
    """Read the names of each class, a class per line; several names of a class are separated by |.

    Raises:
        InputError: See `read_lines`; or a name is empty.
    """
    classes: list[tuple[str, ...]] = []
    for number, line in enumerate(read_lines(path), start=1):
        names = tuple(name.strip() for name in line.split(NAME_SEPARATOR))
        if not all(names):
            raise InputError(f"{path}:{number}: expected a name on each side of {NAME_SEPARATOR}, found {line!r:.60}")
        classes.append(names)
    return classes


def read_prompts(folders: Iterable[Path]) -> tuple[str, ...]:
    """Read the prompt templates of the first folder that has some; without any: an empty tuple.

    Raises:
        InputError: See `read_templates`.
    """
    file = first_file(folders, TEMPLATES)
    return () if file is None else read_templates(file)


def read_templates(path: Path) -> tuple[str, ...]:
    """Read prompt templates, one per line, each with {c} or {} for the class name.

    Raises:
        InputError: See `read_lines`; or a line contains neither {c} nor {}.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not is_template(line):
            raise InputError(f"{path}:{number}: expected a prompt with {{c}} in it, found {line!r:.60}")
    return lines


def is_template(prompt: str) -> bool:
    """Whether a prompt has a place for the name of a class."""
    return "{c}" in prompt or "{}" in prompt


def prompt_of(template: str, name: str) -> str:
    """Insert a class name into a prompt template; other braces are left unchanged."""
    return template.replace("{c}", name).replace("{}", name)


def read_lines(path: Path) -> tuple[str, ...]:
    """Read the stripped lines of a text file; empty lines at the end are ignored.

    Raises:
        InputError: The file is missing, not UTF-8 or empty, or has an empty line before the last text.
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


def first_file(folders: Iterable[Path], name: str) -> Path | None:
    """The path of the file `name` in the first folder that has it; None if there is none."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
