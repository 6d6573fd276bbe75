"""Files that are whole or absent: atomic writes, locks, checksums, JSON, and the one error for bad input."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing here") from None
        except OSError as error:
            # Some network disks know no locks; there, not to start two writers is left to the user.
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        yield
    finally:
        os.close(descriptor)


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
    """Yield a temporary path beside `final`; on success it is flushed to disk and renamed to `final`.

    When the body raises, the temporary file is removed and `final` is left as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        with _naming(final):
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, final)
        fsync_folder(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; on success it takes the place of `final`, whatever stood there.

    When the body raises, the temporary folder is removed and `final` is left as it was. Folders that a killed process
    left behind are removed by the next call for the same `final`.
    """
    # Without the links: the folder itself is replaced, and its neighbours lie on the same disk.
    final = final.resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    # mkdtemp is private to its maker; a model or checkpoint folder has the ordinary permissions.
    temporary.chmod(0o777 & ~_umask())
    try:
        with locked_folder(temporary), _naming(final):
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file() or path.is_dir():
                    fsync_folder(path)
            _put_in_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def _remove_abandoned(final: Path) -> None:
    """Clear what killed processes left beside `final`: half-written folders, and an old folder not yet replaced."""
    name = glob.escape(final.name)
    for folder in final.parent.glob(f".{name}.????????.tmp"):
        # A living process holds the lock of its folder.
        with contextlib.suppress(InputError, FileNotFoundError), locked_folder(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for retired in final.parent.glob(f".{name}.????????.old"):
        if final.exists():
            _remove(retired)
        else:
            os.rename(retired, final)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in constant memory."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
