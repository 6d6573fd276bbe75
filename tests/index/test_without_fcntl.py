"""Files are written and read on systems that lack what Linux has: no fcntl, no fork, no pread, no posix_fallocate."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from index.files import atomic_folder, atomic_path, disk_space, locked_folder, locks, open_binary, read_at, reading

REMOVED = ("pread", "posix_fallocate", "register_at_fork", "sched_getaffinity", "getloadavg", "fork")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that use functions of the operating system as Windows has them."""

    def open_no_folder(path: Any, *arguments: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, *arguments, **options)

    # Only for the modules themselves: shutil and others have ways of their own there.
    there = {name: value for name, value in vars(os).items() if name not in REMOVED}
    for module in (locks, reading, disk_space):
        monkeypatch.setattr(module, "os", SimpleNamespace(**{**there, "open": open_no_folder}))
    monkeypatch.setattr(locks, "fcntl", None)


def test_files_and_folders_are_replaced_without_locks(windows: None, tmp_path: Path) -> None:
    target, folder = tmp_path / "report.json", tmp_path / "model"
    for content in ("old", "new"):
        with locked_folder(tmp_path), atomic_path(target) as temporary:
            temporary.write_text(content)
        with atomic_folder(folder) as temporary:
            (temporary / "weights").write_text(content)
    assert target.read_text() == (folder / "weights").read_text() == "new"
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["model", "report.json"]
    assert not locks._descriptors


def test_threads_read_at_positions_without_pread(windows: None, tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(bytes(range(256)) * 64)
    descriptor = open_binary(path)
    os.lseek(descriptor, 7, os.SEEK_SET)
    starts = [(37 * number) % 256 for number in range(500)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: read_at(descriptor, 3, start), starts))
    assert [each[0] for each in found] == starts and all(len(each) == 3 for each in found)
    assert read_at(descriptor, 10, 256 * 64 - 2) == b"\xfe\xff"
    # Whoever reads or writes the file in order is not disturbed.
    assert os.read(descriptor, 1) == b"\x07"
    os.close(descriptor)


def test_space_is_reserved_without_posix_fallocate(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_space, "ZEROS_AT_ONCE", 5)
    path = tmp_path / "lists"
    path.write_bytes(b"abc")
    disk_space.reserve(path, 13)
    assert path.read_bytes() == b"abc" + bytes(10)
    disk_space.reserve(path, 2)
    assert path.stat().st_size == 13


def test_the_package_is_imported_without_what_only_linux_has() -> None:
    code = f"""
import os, signal, sys
for name in {REMOVED!r}:
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM"):
    delattr(signal, name)
sys.modules.update(fcntl=None, resource=None, pwd=None, grp=None, termios=None)
import index.files, index.ann.index, retriever, retriever.cli.command_line, retriever.utils.interrupt
import retriever.serve.connections, retriever.data.table, retriever.data.splitting.rows, retriever.data.images.tars
import index.passage_lines
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=100)
