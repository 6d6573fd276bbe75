"""A disk that is too small is told before a long write begins; lists on disk reserve their space."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import assert_refused, command

from index.files import disk_space


def test_too_small_a_disk_is_told_before_anything_is_written(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    commands = [
        ("encode", "--model", world.model, "--data", world.beir, "--out", out),
        ("index", "build", "--embeddings", world.embeddings, "--out", out),
        ("train", world.config, "--out", out),
    ]
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    for words in commands:
        assert_refused(command(*words), 1, rf"{out}: expected .* MiB of free disk space for .*, found 0.0 MiB")
        assert not out.exists()
    # An unknown size is not refused.
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    assert command(*commands[1]).code == 0


def test_lists_on_disk_reserve_their_space(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = ("index", "build", "--embeddings", world.embeddings, "--out", tmp_path / "out", "--factory", "IVF2,Flat")
    monkeypatch.setattr(disk_space.os, "posix_fallocate", full)
    assert_refused(command(*words, "--on-disk"), 1, r"lists.ivfdata: No space left on device")
    assert not list(tmp_path.iterdir())
