"""Sets of images by their layout: a table, a webdataset, or folders of images."""

from __future__ import annotations

from pathlib import Path

from eval.zero_shot.data import SPLITS, ZeroShotSet
from eval.zero_shot.layouts import open_image_folder, open_webdataset
from eval.zero_shot.tables import open_table
from index.beir import is_beir_folder
from index.files import InputError


def open_set(path: Path, split: str = "test") -> ZeroShotSet:
    """Find out which layout `path` holds, and read what describes the set.

    A file is a table of images; a folder with tars, or with nshards.txt, is a webdataset; any other holds a folder of
    images for each class. In a folder, the one named after the split is taken where there is one.

    Raises:
        InputError: it holds none of them, or what it says of itself is wrong.
    """
    if path.suffix == ".tar" and not path.is_dir():
        # The files that describe a set lie beside its tars, or above the folder of the split.
        folder = path.parent.parent if path.parent.name in SPLITS else path.parent
        raise InputError(f"{path}: expected the folder of a set, found tars; give {folder}")
    if path.is_file():
        found = open_table(path)
    elif not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    elif is_beir_folder(path):
        raise InputError(
            f"{path}: expected a set of images (a folder for each class, a folder of tars, or a table), found a BEIR "
            "folder of texts"
        )
    else:
        base = path / split if (path / split).is_dir() else path
        if base == path and (others := _splits_in(path)):
            raise InputError(f"{path}: expected a folder for the split {split!r}, found {', '.join(others)}")
        found = open_webdataset(path, base) if _is_packed(base) else open_image_folder(path, base)
    if not found.samples or (found.task == "retrieval" and not any(sample.captions for sample in found.samples)):
        raise InputError(f"{path}: expected images{' with captions' if found.samples else ''}, found none")
    return found


def _splits_in(folder: Path) -> list[str]:
    """The splits that a folder holds, which are no classes: all its folders have the names of some, or hold tars."""
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if _is_packed(folder) or not all(entry.name in SPLITS or _is_packed(entry) for entry in inner):
        return []
    return [entry.name for entry in inner]


def _is_packed(folder: Path) -> bool:
    return (folder / "nshards.txt").is_file() or any(folder.glob("*.tar"))
