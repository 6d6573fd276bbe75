"""Download the public BEIR sets by name and verify them against the published md5 checksums."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from eval.sets.plan import BY_NAME, SetDefinition
from index.files import InputError, atomic_folder, atomic_path

MIRROR = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"
CHUNK_BYTES = 2**20
# Seconds without a received byte.
TIMEOUT_S = 60


def download(name: str, home: Path, *, mirror: str = MIRROR, progress: Callable[[int], None] | None = None) -> Path:
    """Download a public set to `home`/`name` unless that folder exists.

    The zip file is downloaded into `home`, verified, unpacked and removed. The folder appears only when it is complete.

    Args:
        name: the name of a public BEIR set.
        home: the folder of the sets; created if missing.
        mirror: the URL of the folder that holds `name`.zip.
        progress: called with the number of bytes received since the last call.

    Returns:
        The folder of the set.

    Raises:
        InputError: the set does not exist or is not public, the server cannot be reached, or the checksum differs
            from the published one.
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
    # An archive left by an earlier call is complete, but its checksum is still unverified.
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
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, open(path, "wb") as stream:
            while chunk := answer.read(CHUNK_BYTES):
                stream.write(chunk)
                if progress is not None:
                    progress(len(chunk))
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
    """Unpack the members below `NAME/` of the archive into `folder`."""
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
                    while chunk := source.read(CHUNK_BYTES):
                        stream.write(chunk)
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{archive}: expected a zip file, found: {error}") from None
