"""The rooms import only what stands below them, and the project's front doors are light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "losses": {"losses"},
    "index": {"index"},
    "eval": {"eval", "index"},
    "retriever": {"retriever", "eval", "index", "losses"},
}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_stands_below_them(room: str) -> None:
    files = sorted((HOUSE / room).rglob("*.py"))
    assert files
    for path in files:
        assert not (imports(path) & MAY_IMPORT.keys()) - MAY_IMPORT[room], path
        assert not imports(path) & {"pickle", "dill", "shelve", "marshal"}, path


@pytest.mark.parametrize("module", ["retriever", "retriever.cli", "index.files"])
def test_front_doors_load_no_heavy_library(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'faiss', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE, check=True)
    assert done.stdout.strip() == "[]"
