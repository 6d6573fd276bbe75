"""Open an image set in any supported layout: a table, a webdataset, or folders of images."""

from __future__ import annotations

from pathlib import Path

from eval.zero_shot.data import SPLITS, ZeroShotSet
from eval.zero_shot.layouts import open_image_folder, open_webdataset
from eval.zero_shot.tables import ANY_COLUMNS, Columns, open_table
from index.beir import is_beir_folder
from index.files import InputError
from index.image_files.folders import is_hidden


def open_set(path: Path, split: str = "test", columns: Columns = ANY_COLUMNS) -> ZeroShotSet:
    """Detect the layout of an image set and read its samples; images are not decoded.

    A file is a table of images, as is a folder of Parquet files or of a saved Hugging Face dataset. A folder with tars
    or nshards.txt is a webdataset. Any other folder has one subfolder of images per class. If a folder has a subfolder
    named after the split, that subfolder is read.

    Args:
        path: the file or folder of the set.
        split: the name of the split.
        columns: the columns of a table. Default: those of the usual names.

    Raises:
        InputError: the path has none of these layouts, the split is missing, or a file that describes the set is
            invalid.
    """
    if path.suffix == ".tar" and not path.is_dir():
        # The files that describe a set are in the folder of its tars, or in the parent of the split's folder.
        folder = path.parent.parent if path.parent.name in SPLITS else path.parent
        raise InputError(f"{path}: expected the folder of a set, found tars; give {folder}")
    if path.name.endswith((".tar.gz", ".tgz")):
        raise InputError(f"{path}: expected the folder of uncompressed tars, found a compressed tar")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if is_beir_folder(path):
        raise InputError(
            f"{path}: expected a set of images (a folder for each class, a folder of tars, or a table), found a BEIR "
            "folder of texts"
        )
    dataset = open_table(path, split, columns) or _open_folder(path, split)
    if not dataset.samples or (dataset.task == "retrieval" and not any(sample.captions for sample in dataset.samples)):
        raise InputError(f"{path}: expected images{' with captions' if dataset.samples else ''}, found none")
    return dataset


def _open_folder(path: Path, split: str) -> ZeroShotSet:
    base = path / split if (path / split).is_dir() else path
    if base == path and (others := _splits_in(path)):
        raise InputError(f"{path}: expected a folder for the split {split!r}, found {', '.join(others)}")
    return open_webdataset(path, base) if _has_tars(base) else open_image_folder(path, base)


def _splits_in(folder: Path) -> list[str]:
    """The subfolders of a folder if all of them are splits, by name or because they hold tars; otherwise none."""
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if _has_tars(folder) or not all(entry.name in SPLITS or _has_tars(entry) for entry in inner):
        return []
    return [entry.name for entry in inner]


def _has_tars(folder: Path) -> bool:
    return (folder / "nshards.txt").is_file() or any(folder.glob("*.tar"))
