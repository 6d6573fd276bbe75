"""Sums of a model's weights and vocabulary: written when a run saves it, checked before it embeds anything."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from index.files import InputError, sha256_files
from index.records import read_lines

CHECKSUM_FILE = "retriever.sha256"
"""In the format of the program sha256sum: `sha256sum --check retriever.sha256`."""
VOCABULARIES = ("tokenizer.json", "vocab.json")
LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def write_checksums(folder: Path) -> None:
    """Write the sums of a complete model folder's weights and vocabularies; its settings may be edited."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [
        name for name in names if not name.endswith((".json", ".md", ".sha256")) or Path(name).name in VOCABULARIES
    ]
    sums = sha256_files([folder / name for name in names])
    lines = [f"{found}  {name}\n" for name, found in zip(names, sums, strict=True)]
    (folder / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def verify_checksums(path_or_name: str, progress: Callable[[int], None] | None = None) -> None:
    """Check the files of a model whose sums are known: from `CHECKSUM_FILE`, or by their names in the hub's cache.

    The hub's cache keeps large files, weights among them, under their sha256. Of other folders nothing is known. What
    is missing is left for the loader to tell.

    Args:
        path_or_name: a folder or hub name.
        progress: called with the number of bytes just checked.

    Raises:
        InputError: a file is another than it was; the message names it.
    """
    known = known_checksums(path_or_name)
    with contextlib.closing(sha256_files(list(known), progress)) as sums:
        for (path, expected), found in zip(known.items(), sums, strict=True):
            if found != expected:
                # In the hub's cache a file is a link.
                help_ = (
                    "download it again" if path.is_symlink() else f"remove {CHECKSUM_FILE} if you changed it on purpose"
                )
                raise InputError(
                    f"{path_or_name}: cannot be loaded: {path}: damaged: expected sha256 {expected[:12]}…, found "
                    f"{found[:12]}…; {help_}"
                )


def known_checksums(path_or_name: str) -> dict[Path, str]:
    """The files of a model that are there and have known sums, with these.

    Raises:
        InputError: a line of `CHECKSUM_FILE` is damaged.
    """
    folder = _folder(path_or_name)
    if folder is None:
        return {}
    known = _stated(folder) if (folder / CHECKSUM_FILE).is_file() else _hub_files(folder)
    return {path: found for path, found in known if path.is_file()}


def _folder(path_or_name: str) -> Path | None:
    if Path(path_or_name).is_dir():
        return Path(path_or_name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_name, local_files_only=True))
    except (OSError, ValueError):
        # It is not there yet, or is no name that the hub could have: loading it will tell.
        return None


def _stated(folder: Path) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(read_lines(folder / CHECKSUM_FILE), start=1):
        found = LINE.fullmatch(line)
        if found is None or Path(found[2]).is_absolute() or ".." in Path(found[2]).parts:
            place = f"{folder / CHECKSUM_FILE}:{number}"
            raise InputError(f"{place}: expected a sha256 and the name of a file in this folder, found {line!r:.60}")
        yield folder / found[2], found[1]


def _hub_files(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.is_file():
            blob = path.resolve()
            if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
                yield path, blob.name
