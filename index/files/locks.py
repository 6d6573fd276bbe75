"""Locks of files and folders, which other processes respect, and renames that last."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from index.files.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable: a rename survives a power cut only after an fsync of its folder.

    Does nothing on Windows, which cannot open folders.
    """
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder`. The operating system releases it when the process ends, even if it is killed.

    Raises:
        InputError: another process holds the lock.
    """
    with descriptor_of(folder) as descriptor:
        # Some network file systems have no locks; there the user must not start two writers.
        if try_lock(descriptor) is False:
            raise InputError(f"{folder}: another process is writing here")
        yield


@contextlib.contextmanager
def descriptor_of(path: Path) -> Iterator[int]:
    """A file descriptor of a file or folder, for `try_lock`."""
    descriptor = open_for_lock(path)
    try:
        yield descriptor
    finally:
        close_lock(descriptor)


# File descriptors that are open now.
_descriptors: set[int] = set()


def open_for_lock(path: Path) -> int:
    """As `descriptor_of`; the caller closes it with `close_lock`, which releases the lock."""
    # Windows does not open folders, and does not rename open files.
    if fcntl is None:
        path = Path(os.devnull)
    # Network file systems lock a file only if it is open for writing; a folder can only be opened for reading.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    _descriptors.add(descriptor)
    return descriptor


def close_lock(descriptor: int) -> None:
    """Close a descriptor of `open_for_lock`."""
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _close_locks_in_child() -> None:
    # A lock lasts until every process that inherited the descriptor has closed it: worker processes would keep the lock
    # of a killed parent.
    devnull = os.open(os.devnull, os.O_RDONLY)
    for descriptor in _descriptors:
        os.dup2(devnull, descriptor)
    os.close(devnull)


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_close_locks_in_child)


def try_lock(descriptor: int) -> bool | None:
    """Try to lock an open file or folder.

    Returns:
        True if locked, False if another process holds the lock, None if the file system or Windows has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        return None
    return True
