"""Files and folders that are written under a temporary name and renamed when they are complete."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from index.files.locks import close_lock, descriptor_of, fsync_folder, open_for_lock, try_lock


@contextlib.contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
    """Add the file name to an OSError that lacks it, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a new, empty temporary file next to `final`; on success flush it to disk and rename it to `final`.

    If the body raises, the temporary file is removed and `final` is left unchanged. Temporary files that a killed
    process left behind are removed by the next call for the same `final`.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(final)
    temporary, descriptor = _new_temporary(final, partial(Path.touch, exist_ok=False))
    try:
        with _name_in_errors(final):
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
        os.replace(temporary, final)
        fsync_folder(final.parent)
    finally:
        temporary.unlink(missing_ok=True)
        close_lock(descriptor)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a new temporary folder next to `final`; on success it replaces `final`, whatever was there.

    If the body raises, the temporary folder is removed and `final` is left unchanged. What a killed process left behind
    is cleaned up by the next call for the same `final`, or by `recover_folder`.
    """
    # Resolve symbolic links: the folder itself is replaced, and the temporary folder must be on the same file system.
    final = final.resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(final)
    temporary, descriptor = _new_temporary(final, Path.mkdir)
    try:
        with _name_in_errors(final):
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file() or path.is_dir():
                    fsync_folder(path)
            _replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        close_lock(descriptor)


def recover_folder(final: Path) -> None:
    """Clean up after a process that was killed within `atomic_folder(final)`.

    A process killed between the two renames leaves the old folder under a temporary name and none under its own: the
    old folder is renamed back. Unfinished new folders, and old ones that were already replaced, are removed. Folders of
    running processes are kept.
    """
    final = final.resolve()
    for retired in _siblings(final, "old"):
        if _is_locked(retired.with_suffix(".tmp")):
            continue  # its process is running, between the two renames
        if final.exists():
            _remove(retired)
        else:
            os.rename(retired, final)
            fsync_folder(final.parent)
    _remove_leftovers(final)


def _replace_folder(temporary: Path, final: Path) -> None:
    retired = temporary.with_suffix(".old")
    if final.exists():
        os.rename(final, retired)
    try:
        os.rename(temporary, final)
    except OSError:
        if retired.exists():
            os.rename(retired, final)
        raise
    fsync_folder(final.parent)
    _remove(retired)


def _new_temporary(final: Path, create: Callable[[Path], None]) -> tuple[Path, int]:
    """Create a file or folder next to `final` with `create`.

    Returns its path, and a descriptor that holds its lock until closed.
    """
    while True:
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
        create(temporary)
        with contextlib.suppress(FileNotFoundError):
            descriptor = open_for_lock(temporary)
            if try_lock(descriptor) is not False and temporary.exists():
                return temporary, descriptor
            # Another process removed it as abandoned before it was locked.
            close_lock(descriptor)


def _remove_leftovers(final: Path) -> None:
    """Remove what killed processes left next to `final`; a running process holds the lock of what it writes."""
    for temporary in _siblings(final, "tmp"):
        # Files of other users cannot be removed, and some may already be gone.
        with contextlib.suppress(FileNotFoundError, PermissionError), descriptor_of(temporary) as descriptor:
            # Without locks it is unknown whether its process still runs: keep it.
            if try_lock(descriptor):
                _remove(temporary)


def _is_locked(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), descriptor_of(path) as descriptor:
        return try_lock(descriptor) is False
    return False


def _siblings(final: Path, suffix: str) -> list[Path]:
    return list(final.parent.glob(f".{glob.escape(final.name)}.????????.{suffix}"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
