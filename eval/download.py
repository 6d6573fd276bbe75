"""Fetch the public sets of BEIR by name, whole and checked against the sums that BEIR publishes."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from eval.suite import BY_NAME, SetDefinition
from index.files import InputError, atomic_folder, atomic_path

MIRROR = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"
PIECE = 2**20
# Seconds without a byte.
PATIENCE = 60


def download(name: str, home: Path, *, mirror: str = MIRROR, progress: Callable[[int], None] | None = None) -> Path:
    """Bring a public set to `home`/`name`, unless it is there.

    The zip file is written beside, checked, unpacked into a folder that takes its name when whole, and removed.

    Args:
        name: one of BEIR's public sets.
        home: made if it is not there.
        mirror: where `name`.zip is.
        progress: called with the bytes that arrived since the last call.

    Raises:
        InputError: there is no such set, it is not public, it cannot be reached, or what came is not what BEIR
            published.
        OSError: the disk is full.
    """
    definition = BY_NAME.get(name)
    if definition is None:
        raise InputError(f"{name}: expected a set of BEIR ({', '.join(BY_NAME)})")
    if definition.md5 is None:
        raise InputError(f"{name}: not public; https://github.com/beir-cellar/beir says how to make it")
    folder = home / name
    if folder.is_dir():
        return folder
    archive = home / f"{name}.zip"
    # An archive that an earlier call left is whole, but need not be the right one.
    if not archive.exists():
        with atomic_path(archive) as temporary:
            _fetch(f"{mirror}/{name}.zip", temporary, progress)
    found = _md5(archive)
    if found != definition.md5:
        archive.unlink()
        raise InputError(f"{mirror}/{name}.zip: expected md5 {definition.md5}, found {found}")
    _unpack(archive, definition, folder)
    archive.unlink()
    return folder


def _fetch(url: str, path: Path, progress: Callable[[int], None] | None) -> None:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer, open(path, "wb") as stream:
            while piece := answer.read(PIECE):
                stream.write(piece)
                if progress is not None:
                    progress(len(piece))
            missing = answer.length
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        if isinstance(error, urllib.error.HTTPError):
            reason = f"{error.code} {reason}"
        raise InputError(f"{url}: cannot be downloaded: {reason}") from None
    if missing:
        raise InputError(f"{url}: cannot be downloaded: the connection ended {missing} bytes early")


def _md5(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Path, definition: SetDefinition, folder: Path) -> None:
    """The members below `NAME/` in the archive, as `folder`."""
    try:
        with zipfile.ZipFile(archive) as members, atomic_folder(folder) as temporary:
            for member in members.infolist():
                parts = PurePosixPath(member.filename).parts
                if member.is_dir() or parts[:1] != (definition.name,):
                    continue
                if ".." in parts:
                    raise InputError(f"{archive}: expected files of {definition.name}, found {member.filename!r:.60}")
                target = temporary.joinpath(*parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with members.open(member) as source, open(target, "wb") as stream:
                    while piece := source.read(PIECE):
                        stream.write(piece)
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{archive}: expected a zip file, found: {error}") from None
