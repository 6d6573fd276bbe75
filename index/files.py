"""Atomic writes of files and folders, locks, checksums, JSON, and `InputError`."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Files hashed at the same time, and bytes read at once from each.
HASH_THREADS = 4
HASH_BLOCK_BYTES = 2**19
# The largest file that is parsed as one JSON value; the longest line that is read as text.
MAX_JSON_BYTES = 2**28
MAX_LINE = 2**28


class InputError(ValueError):
    """Something in the user's input is wrong.

    The message is one line that names the file (and the line in it), what was expected and what was found; the
    command line prints it without a traceback. Control characters of what was found are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escape_control(message))


class ConfigError(InputError):
    """An invalid setting. The command line exits with code 2."""


class ArgumentError(ConfigError):
    """An argument of a public function that is not valid.

    Attributes:
        argument: Name of the argument; the command line prints the flag of that name.
        problem: What was expected and what was found.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}")
        self.argument = argument
        self.problem = problem


def escape_control(text: str) -> str:
    """Escape the characters of a text that are not printable: line ends, terminal commands, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    raise InputError(f"{path}: no such file: expected a regular file, found a {kinds.get(stat.S_IFMT(mode), 'device')}")


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
    with _descriptor_of(folder) as descriptor:
        # Some network file systems have no locks; there the user must not start two writers.
        if _lock(descriptor) is False:
            raise InputError(f"{folder}: another process is writing here")
        yield


@contextlib.contextmanager
def _descriptor_of(path: Path) -> Iterator[int]:
    descriptor = _open(path)
    try:
        yield descriptor
    finally:
        _close(descriptor)


# File descriptors that are open now.
_descriptors: set[int] = set()


def _open(path: Path) -> int:
    # Windows does not open folders, and does not rename open files.
    if fcntl is None:
        path = Path(os.devnull)
    # Network file systems lock a file only if it is open for writing; a folder can only be opened for reading.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    _descriptors.add(descriptor)
    return descriptor


def _close(descriptor: int) -> None:
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


def _lock(descriptor: int) -> bool | None:
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
        _close(descriptor)


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
        _close(descriptor)


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
            descriptor = _open(temporary)
            if _lock(descriptor) is not False and temporary.exists():
                return temporary, descriptor
            # Another process removed it as abandoned before it was locked.
            _close(descriptor)


def _remove_leftovers(final: Path) -> None:
    """Remove what killed processes left next to `final`; a running process holds the lock of what it writes."""
    for temporary in _siblings(final, "tmp"):
        # Files of other users cannot be removed, and some may already be gone.
        with contextlib.suppress(FileNotFoundError, PermissionError), _descriptor_of(temporary) as descriptor:
            # Without locks it is unknown whether its process still runs: keep it.
            if _lock(descriptor):
                _remove(temporary)


def _is_locked(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), _descriptor_of(path) as descriptor:
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
    """Hexadecimal sha256 of a file, in constant memory. `progress` is called with the number of bytes just read."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(HASH_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path], progress: Callable[[int], None] | None = None) -> Generator[str, None, None]:
    """`sha256_file` of each path, in order.

    Files are read in parallel, because one core hashes slower than a disk reads. `progress` is called from several
    threads, one at a time.
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
    with ThreadPoolExecutor(min(len(paths), HASH_THREADS, os.cpu_count() or 1)) as pool:
        try:
            yield from pool.map(sum_of, paths)
        finally:
            pool.shutdown(cancel_futures=True)


def parse_json(text: str, place: str) -> Any:
    """Parse a JSON text; `place` ("file:line") begins error messages.

    Raises:
        InputError: `text` is not JSON, is nested too deeply, or contains half of a surrogate pair, which cannot be
            written as UTF-8.
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
        # The line number of the error counts within `text`; `place` has that of the file.
        at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise InputError(f"{place}: expected JSON, found: {error.msg} at {at}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: expected JSON, found: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented UTF-8 JSON; NaN and infinity are refused."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or not JSON.
    """
    try:
        check_readable(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: expected at most {MAX_JSON_BYTES:,} bytes, found {path.stat().st_size:,}")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected JSON, found: {error}") from None
    return parse_json(text, str(path))
