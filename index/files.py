"""Files that are whole or absent: atomic writes, locks, checksums, JSON, and the one error for bad input."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# Files summed at the same time, and bytes of one that are read at once.
SUMS_AT_ONCE = 4
SUM_BYTES = 2**19


class InputError(ValueError):
    """Something in the user's input is wrong.

    The message is one line that names the file (and the line in it), what was expected and what was found; the
    command line prints it without a traceback.
    """


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut (a rename is durable only once its folder is)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone. The system drops the lock when the process ends, however it ends.

    Raises:
        InputError: another process holds it.
    """
    with _opened(folder) as descriptor:
        # Some network disks know no locks; there, not to start two writers is left to the user.
        if _lock(descriptor) is False:
            raise InputError(f"{folder}: another process is writing here")
        yield


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = _open(path)
    try:
        yield descriptor
    finally:
        _close(descriptor)


# What `_open` gave and `_close` has not yet taken.
_descriptors: set[int] = set()


def _open(path: Path) -> int:
    # Network disks lock a file only for those who may write it; a folder can only be read.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    _descriptors.add(descriptor)
    return descriptor


def _close(descriptor: int) -> None:
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _leave_locks_to_the_parent() -> None:
    # A lock lasts until every process that has its descriptor is gone: workers would keep a killed parent's.
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor in _descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def _lock(descriptor: int) -> bool | None:
    """Lock what was opened until it is closed: False when another process holds it, None when the disk has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        return None
    return True


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk is reported by the system without saying which file it was: add the name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a temporary file beside `final`, empty so far; on success it is flushed to disk and renamed to `final`.

    When the body raises, the temporary file is removed and `final` is left as it was. Files that a killed process
    left behind are removed by the next call for the same `final`.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    temporary, descriptor = _new_temporary(final, partial(Path.touch, exist_ok=False))
    try:
        with _naming(final):
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, final)
        fsync_folder(final.parent)
    finally:
        temporary.unlink(missing_ok=True)
        _close(descriptor)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; on success it takes the place of `final`, whatever stood there.

    When the body raises, the temporary folder is removed and `final` is left as it was. What a killed process left
    behind is mended by the next call for the same `final`, or by `recover_folder`.
    """
    # Without the links: the folder itself is replaced, and its neighbours lie on the same disk.
    final = final.resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(final)
    temporary, descriptor = _new_temporary(final, Path.mkdir)
    try:
        with _naming(final):
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file() or path.is_dir():
                    fsync_folder(path)
            _put_in_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _close(descriptor)


def recover_folder(final: Path) -> None:
    """Undo what a process that was killed within `atomic_folder(final)` left; nothing happens if there is nothing.

    Killed while it exchanged the folders, it left the old one under another name and none under its own: the old one
    is put back. Half-written folders, and old ones already replaced, are removed. Those of living processes stay.
    """
    final = final.resolve()
    for retired in _siblings(final, "old"):
        if _is_held(retired.with_suffix(".tmp")):
            continue  # its owner lives, and is exchanging the two folders at this moment
        if final.exists():
            _remove(retired)
        else:
            os.rename(retired, final)
            fsync_folder(final.parent)
    _remove_abandoned(final)


def _put_in_place(temporary: Path, final: Path) -> None:
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
    """A new file or folder beside `final`, made by `create`, and a descriptor that holds its lock until closed."""
    while True:
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
        create(temporary)
        with contextlib.suppress(FileNotFoundError):
            descriptor = _open(temporary)
            if _lock(descriptor) is not False and temporary.exists():
                return temporary, descriptor
            # Before it was locked, another process took it for abandoned.
            _close(descriptor)


def _remove_abandoned(final: Path) -> None:
    """Remove what killed processes were writing beside `final`; a living one holds the lock of what it writes."""
    for temporary in _siblings(final, "tmp"):
        # One of another user's is not ours to remove, and one that is gone needs no removing.
        with contextlib.suppress(FileNotFoundError, PermissionError), _opened(temporary) as descriptor:
            # On a disk without locks nobody can know, so everything stays.
            if _lock(descriptor):
                _remove(temporary)


def _is_held(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), _opened(path) as descriptor:
        return _lock(descriptor) is False
    return False


def _siblings(final: Path, suffix: str) -> list[Path]:
    return list(final.parent.glob(f".{glob.escape(final.name)}.????????.{suffix}"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hexadecimal sha256 of a file's bytes, read in constant memory; `progress` gets the number of bytes just read."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(SUM_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path], progress: Callable[[int], None] | None = None) -> Generator[str, None, None]:
    """`sha256_file` of each path, in order; several are read at once, for one core sums slower than a disk reads.

    `progress` is called from several threads, one at a time.
    """
    lock = threading.Lock()

    def locked(count: int) -> None:
        assert progress is not None
        with lock:
            progress(count)

    sum_of = partial(sha256_file, progress=None if progress is None else locked)
    if len(paths) < 2:
        yield from map(sum_of, paths)
        return
    with ThreadPoolExecutor(min(len(paths), SUMS_AT_ONCE, os.cpu_count() or 1)) as pool:
        try:
            yield from pool.map(sum_of, paths)
        finally:
            pool.shutdown(cancel_futures=True)


def parse_json(text: str, place: str) -> Any:
    """The value that a JSON text holds; `place` is named in errors.

    Raises:
        InputError: `text` is no JSON, is nested too deep, or holds half of a surrogate pair, which is no character
            and could not be written again.
    """
    try:
        value = json.loads(text)
        # Text that was read as UTF-8 gets a lone surrogate only from an escape such as \\ud83d.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise InputError(f"{place}: expected Unicode text, found half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        # Its own line number counts within `text`; `place` knows the file's.
        at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise InputError(f"{place}: expected JSON, found: {error.msg} at {at}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: expected JSON, found: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented UTF-8 JSON; non-finite numbers are refused."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected JSON, found: {error}") from None
    return parse_json(text, str(path))
