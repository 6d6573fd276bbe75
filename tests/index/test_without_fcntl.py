"""Files are written atomically on Windows too, which has no fcntl, does not fork, and opens no folders."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import index.files


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module index.files as Windows imports it."""

    def open_no_folder(path: Any, *arguments: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, *arguments, **options)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "register_at_fork")
    spec = importlib.util.spec_from_file_location("files_on_windows", index.files.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Only for the module itself: shutil and others have ways of their own there.
    monkeypatch.setattr(module, "os", SimpleNamespace(**{**vars(os), "open": open_no_folder}))
    return module


def test_files_and_folders_are_replaced_without_locks(files: ModuleType, tmp_path: Path) -> None:
    target, folder = tmp_path / "report.json", tmp_path / "model"
    for content in ("old", "new"):
        with files.locked_folder(tmp_path), files.atomic_path(target) as temporary:
            temporary.write_text(content)
        with files.atomic_folder(folder) as temporary:
            (temporary / "weights").write_text(content)
    assert target.read_text() == (folder / "weights").read_text() == "new"
    with pytest.raises(RuntimeError), files.atomic_folder(folder) as temporary:
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["model", "report.json"]
    assert not files._descriptors
