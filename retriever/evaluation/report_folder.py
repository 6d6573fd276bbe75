"""The folder of a report, temporary unless the caller named one."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from index.files import InputError
from retriever.errors import ArgumentError, check_paths

# Large folders that are needed to compute a report, but are not part of it.
WORKING_FOLDERS = ("embeddings", "windows", "index", "images")


class ReportFolder:
    """A folder for a report; a temporary one is removed with this object.

    Args:
        out: The folder, or None for a temporary one.
    """

    def __init__(self, out: str | Path | None) -> None:
        if out is not None:
            check_paths(out=out)
            if Path(out).exists() and not Path(out).is_dir():
                raise ArgumentError("out", f"expected a folder, found the file {out}")
        self._temporary = tempfile.TemporaryDirectory(prefix="retriever-") if out is None else None
        self.path = Path(self._temporary.name) if self._temporary is not None else Path(str(out))

    def __repr__(self) -> str:
        return f"ReportFolder({str(self.path)!r})"

    def save(self, folder: str | Path) -> Path:
        """Copy the report to `folder`, which must be new or empty, without embeddings and indexes; returns it.

        Raises:
            InputError: `folder` contains something, is a file, or lies within the report.
        """
        check_paths(folder=folder)
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: expected a new or empty folder, found a file")
        if self.path.resolve() in folder.resolve().parents:
            raise InputError(f"{folder}: expected a folder outside the report, found one within {self.path}")
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: expected a new or empty folder, found {next(folder.iterdir()).name} in it")
        shutil.copytree(self.path, folder, ignore=shutil.ignore_patterns(*WORKING_FOLDERS, ".*"), dirs_exist_ok=True)
        return folder
