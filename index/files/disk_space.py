"""Free space on disk: checked before a long write, and reserved for files that are written through memory maps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from index.files.errors import InputError

ZEROS_AT_ONCE = 2**22


def check_free_space(folder: Path, needed: int, what: str, *, replaces: Path | None = None) -> None:
    """Check that the disk of a folder has enough free space for what a long run will write.

    Args:
        folder: the folder; it may not exist yet.
        needed: bytes that the files will have.
        what: what will be written, for the message.
        replaces: folder whose files already belong to what is needed, such as an incomplete store. Default: None.

    Raises:
        InputError: fewer bytes are free.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    disk = shutil.disk_usage(existing)
    if replaces is not None and replaces.is_dir():
        needed -= sum(path.stat().st_size for path in replaces.rglob("*") if path.is_file())
    # Some network file systems report no sizes.
    if disk.total and disk.free < needed:
        raise InputError(f"{folder}: expected {_size(needed)} of free disk space for {what}, found {_size(disk.free)}")


def reserve(path: Path, size: int) -> None:
    """Allocate the blocks of a file, which is extended if it is smaller.

    A write through a memory map to a full disk ends the process with SIGBUS; here it is an error.

    Raises:
        OSError: the disk is full. The error names the file.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            _append_zeros(descriptor, size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def _append_zeros(descriptor: int, size: int) -> None:
    """Extend a file to `size` bytes; macOS and Windows have no posix_fallocate, and written zeros take blocks there."""
    missing = size - os.lseek(descriptor, 0, os.SEEK_END)
    while missing > 0:
        missing -= os.write(descriptor, bytes(min(missing, ZEROS_AT_ONCE)))


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
