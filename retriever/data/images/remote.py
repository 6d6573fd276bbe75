"""Local copies of files at a URL and of compressed tars, because samples are read at random positions."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from index.files import InputError, atomic_path
from retriever.data.images.tars import COMPRESSED_TARS, expand_braces

_BLOCK = 2**20


def is_url(path: str) -> bool:
    """Whether a path is a URL such as https://…, s3://… or hf://…"""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def local_files(path: str, cache: Path, progress: Callable[[int], None] | None = None) -> list[Path]:
    """Return the local files of a path: files at URLs are downloaded and compressed tars unpacked into `cache`.

    A URL is opened with fsspec, and downloaded only once. Braces and wildcards are expanded, the latter also in URLs.

    Args:
        path: A path or URL, with braces such as {000..331}, or with wildcards (*, ?, [).
        cache: Folder for the copies.
        progress: Called with the number of files that were copied since the last call.

    Raises:
        InputError: If a file is missing or cannot be read, or a package that fsspec needs is missing.
    """
    found: list[Path] = []
    for name in expand_braces(path):
        names = _matching(name) if glob.has_magic(name) and not Path(name).exists() else [name]
        if not names:
            raise InputError(f"{name}: no such file" + (f" (of {path})" if name != path else ""))
        for each in names:
            file = _downloaded(each, cache, progress) if is_url(each) else Path(each)
            if not file.is_file():
                raise InputError(f"{file}: no such file" + (f" (of {path})" if str(file) != path else ""))
            found.append(_unpacked(file, cache, progress) if file.name.endswith(COMPRESSED_TARS) else file)
    return found


def _matching(pattern: str) -> list[str]:
    """The files of a pattern with wildcards, sorted."""
    if not is_url(pattern):
        return sorted(glob.glob(pattern))
    import fsspec

    with _fsspec_errors(pattern):
        filesystem, _, _ = fsspec.get_fs_token_paths(pattern)
        return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern))


def _downloaded(url: str, cache: Path, progress: Callable[[int], None] | None) -> Path:
    import fsspec

    # The name is kept, because its ending is the format.
    path = cache / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / Path(url.partition("?")[0]).name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _fsspec_errors(url), atomic_path(path) as temporary, open(temporary, "wb") as out, fsspec.open(url) as stream:
        shutil.copyfileobj(stream, out, _BLOCK)
    # An index of the file must not depend on the time of the download.
    os.utime(path, (0, 0))
    if progress is not None:
        progress(1)
    return path


def _unpacked(file: Path, cache: Path, progress: Callable[[int], None] | None) -> Path:
    """Return the uncompressed copy of a compressed tar."""
    stat = file.stat()
    identity = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    name = next(file.name.removesuffix(end) for end in COMPRESSED_TARS if file.name.endswith(end))
    path = cache / "unpacked" / hashlib.sha256(identity.encode()).hexdigest()[:16] / f"{name}.tar"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as out, gzip.open(file) as stream:
            shutil.copyfileobj(stream, out, _BLOCK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file}: expected a tar compressed by gzip, found one that cannot be read: {error}") from None
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    if progress is not None:
        progress(1)
    return path


@contextmanager
def _fsspec_errors(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(f"{url}: reading it needs another package: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001
        # The exceptions of the many file systems have no base class in common.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{url}: cannot be read: {reason:.200}") from None
