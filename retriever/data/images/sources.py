"""Opening sources of pairs of an image and its captions: tars, tables, folders and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from index.files import InputError
from index.image_files.folders import IMAGES, is_hidden
from retriever.config.images import ImageSource
from retriever.data.images.class_pairs import ClassPairs
from retriever.data.images.file_pairs import FilePairs
from retriever.data.images.huggingface_pairs import HuggingFacePairs
from retriever.data.images.pairs import BrokenPairError, PairSource, check_broken
from retriever.data.images.parquet_pairs import ParquetPairs, contains_images
from retriever.data.images.remote import is_url, local_files
from retriever.data.images.tar_pairs import TarPairs
from retriever.data.images.tars import COMPRESSED_TARS, index_shards

# Callers of open_pairs need the types of what it returns and raises.
__all__ = ["TARS", "BrokenPairError", "PairSource", "check_path", "detect_format", "open_pairs", "tar_files"]

TARS = (".tar", *COMPRESSED_TARS)


def open_pairs(
    source: ImageSource, cache: Path, *, workers: int = 0, progress: Callable[[int], None] | None = None
) -> PairSource:
    """Open a source of pairs.

    Args:
        source: The source.
        cache: Folder for indexes of tars, converted tables, downloads and unpacked tars.
        workers: Number of processes that index tars. Default: 0, the calling process.
        progress: Called with the number of tars or rows done since the last call.

    Raises:
        InputError: If the source is missing, broken or empty, lacks a column, or more than `source.max_broken` of its
            pairs cannot be used.
    """
    check_path(source.path)
    format_ = source.format if source.format != "auto" else detect_format(source.path)
    pairs: PairSource
    if format_ == "webdataset":
        shards = tar_files(source.path, cache, progress)
        samples = index_shards(source.path, shards, cache / "tars", workers=workers, progress=progress)
        pairs = TarPairs(source, samples)
    elif format_ == "files":
        pairs = _open_tables(source, cache, progress)
    elif format_ == "classes":
        pairs = ClassPairs(source)
    else:
        pairs = HuggingFacePairs(source)
    check_broken(source.path, pairs.skipped, pairs.skipped + len(pairs), source.max_broken, "; ".join(pairs.notices))
    return pairs


def check_path(path: str) -> None:
    """Check that a path has a form that is read.

    Raises:
        InputError: If it is a command, or several sources in one path.
    """
    if path.startswith("pipe:"):
        raise InputError(f"{path}: commands are not run; expected the path or URL of the tars that it reads")
    if "::" in path and not path.startswith(("simplecache::", "filecache::")):
        raise InputError(f"{path}: expected one path; give each part between :: as a separate source")


def detect_format(path: str) -> str:
    """Return the format of a path: webdataset, files, classes or huggingface."""
    if path.endswith(TARS):
        return "webdataset"
    folder = Path(path)
    if not folder.is_dir():
        return "files"
    if any(entry.name.endswith(TARS) for entry in folder.iterdir()):
        return "webdataset"
    return "classes" if _has_class_folders(folder) else "huggingface"


def tar_files(path: str, cache: Path, progress: Callable[[int], None] | None = None) -> list[Path]:
    """Return the tars of a folder (sorted), or of a path or URL with braces or wildcards.

    Raises:
        InputError: If a tar does not exist, or the folder has none.
    """
    folder = Path(path)
    if not folder.is_dir():
        return local_files(path, cache, progress)
    shards = sorted(entry for entry in folder.iterdir() if entry.name.endswith(TARS) and not is_hidden(entry.name))
    if not shards:
        raise InputError(f"{path}: expected .tar files, found none")
    return [file for shard in shards for file in local_files(str(shard), cache, progress)]


def _open_tables(source: ImageSource, cache: Path, progress: Callable[[int], None] | None) -> PairSource:
    if not source.path.partition("?")[0].endswith(".parquet"):
        if is_url(source.path):
            raise InputError(
                f"{source.path}: expected tars or Parquet files with images at a URL; download other files"
            )
        return FilePairs.open(source, cache, progress)
    files = local_files(source.path, cache, progress)
    if contains_images(files[0], source.image):
        return ParquetPairs.open(source, files, cache, progress)
    if len(files) > 1:
        raise InputError(f"{source.path}: expected one table of image paths, found {len(files)} files")
    return FilePairs.open(source, cache, progress)


def _has_class_folders(folder: Path) -> bool:
    """Whether a folder in the folder contains an image, and no file describes the folder as a dataset."""
    entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    if any(entry.suffix in (".json", ".jsonl", ".csv", ".parquet", ".arrow") for entry in entries):
        return False
    return any(file.suffix.lower() in IMAGES for entry in entries if entry.is_dir() for file in entry.iterdir())
