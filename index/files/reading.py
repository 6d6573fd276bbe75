"""Reading files at a position, also by several threads at once, and checking that a path is a regular file."""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from pathlib import Path

from index.files.errors import InputError

# The longest line that is read as text.
MAX_LINE = 2**28
# Held where the position of a file has to be moved for a read.
_moving = threading.Lock()


def check_readable(path: Path) -> None:
    """Refuse named pipes and devices, which have no end or no content, and folders.

    Pipes that a shell has opened, such as /dev/stdin and those of `<(command)`, are accepted.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is not a regular file.
    """
    try:
        mode = path.stat().st_mode
    except NotADirectoryError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    if stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and re.match("/dev/(fd/|stdin)|/proc/self/fd/", str(path))):
        return
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    raise InputError(f"{path}: expected a regular file, found a {kinds.get(stat.S_IFMT(mode), 'device')}")


def open_binary(path: Path) -> int:
    """A file descriptor for `read_at`."""
    # Windows would otherwise translate line ends.
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read at most `size` bytes at `offset` of an open file, and leave its position where it is.

    Threads, and processes that were forked after the file was opened, can read at the same time. Windows cannot read
    without moving the position; a lock keeps the threads apart there, and no process is forked.
    """
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _moving:
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)
        finally:
            os.lseek(descriptor, position, os.SEEK_SET)
