"""sha256 checksums of a model's weights and vocabulary: written when a model is saved, verified when it is loaded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from index.files import InputError, sha256_files
from index.records import read_lines
from retriever.models.loading.hub import cached_model

CHECKSUM_FILE = "retriever.sha256"
"""Name of the file with the checksums, in the format of sha256sum: `sha256sum --check retriever.sha256`."""
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def write_checksums(folder: Path) -> None:
    """Write the checksums of the weights and vocabularies of a complete model folder.

    Other JSON files are not included, so that settings can be edited.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [
        name for name in names if not name.endswith((".json", ".md", ".sha256")) or Path(name).name in _VOCABULARIES
    ]
    checksums = sha256_files([folder / name for name in names])
    lines = [f"{checksum}  {name}\n" for name, checksum in zip(names, checksums, strict=True)]
    (folder / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def verify_checksums(path_or_name: str, progress: Callable[[int], None] | None = None) -> None:
    """Verify the files of a model whose checksums are known.

    Checksums come from `CHECKSUM_FILE`, or from the names of large files in the hub's cache. Other folders have none.
    Missing files are not reported here; loading the model reports them.

    Args:
        path_or_name: A folder or hub name.
        progress: Called with the number of bytes verified since the last call.

    Raises:
        InputError: If a file has another checksum; the message names the file.
    """
    known = known_checksums(path_or_name)
    with contextlib.closing(sha256_files(list(known), progress)) as checksums:
        for (path, expected), found in zip(known.items(), checksums, strict=True):
            if found != expected:
                # The files of the hub's cache are symbolic links.
                help_ = (
                    "download it again" if path.is_symlink() else f"remove {CHECKSUM_FILE} if you changed it on purpose"
                )
                raise InputError(
                    f"{path_or_name}: cannot be loaded: {path}: damaged: expected sha256 {expected[:12]}…, found "
                    f"{found[:12]}…; {help_}"
                )


def known_checksums(path_or_name: str) -> dict[Path, str]:
    """Return path -> sha256 of the existing files of a model with known checksums.

    Raises:
        InputError: If a line of `CHECKSUM_FILE` is invalid.
    """
    folder = cached_model(path_or_name)
    if folder is None:
        return {}
    known = _listed_files(folder) if (folder / CHECKSUM_FILE).is_file() else _hub_files(folder)
    return {path: checksum for path, checksum in known if path.is_file()}


def _listed_files(folder: Path) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(read_lines(folder / CHECKSUM_FILE), start=1):
        match = _LINE.fullmatch(line)
        if match is None or Path(match[2]).is_absolute() or ".." in Path(match[2]).parts:
            location = f"{folder / CHECKSUM_FILE}:{number}"
            raise InputError(f"{location}: expected a sha256 and the name of a file in this folder, found {line!r:.60}")
        yield folder / match[2], match[1]


def _hub_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the large files of a snapshot in the hub's cache, which are stored under their sha256."""
    if not any((folder / name).exists() for name in ("modules.json", "config.json", "adapter_config.json")):
        # Not a model: the folder may be a whole disk.
        return
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.is_file():
            blob = path.resolve()
            if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
                yield path, blob.name
