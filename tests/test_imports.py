"""Imports go one way, between packages and inside them, and importing the project loads no heavy library."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import retriever

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_those_below_them(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not (imports(path) & MAY_IMPORT.keys()) - MAY_IMPORT[package], path
        assert not imports(path) & {"pickle", "dill", "shelve", "marshal"}, path


def parts_imported(path: Path, package: str) -> set[str]:
    """The modules and sub-packages, directly below a package, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            found.add((node.module or "").removeprefix(f"{package}.").split(".")[0])
    return found


def all_packages() -> list[str]:
    """Every package and sub-package, as a path."""
    return sorted(
        path.parent.relative_to(ROOT).as_posix() for top in MAY_IMPORT for path in (ROOT / top).rglob("__init__.py")
    )


@pytest.mark.parametrize("package", all_packages())
def test_no_package_holds_more_than_16_entries(package: str) -> None:
    entries = [path.stem for path in (ROOT / package).glob("*.py")]
    entries += [path.parent.name for path in (ROOT / package).glob("*/__init__.py")]
    assert len(set(entries) - {"__init__", "__main__"}) <= 16


@pytest.mark.parametrize("package", all_packages())
def test_no_sub_packages_import_each_other(package: str) -> None:
    folder = ROOT / package
    name = package.replace("/", ".")
    parts = {path.stem: [path] for path in folder.glob("*.py") if path.stem != "__init__"}
    for sub in (path.parent for path in folder.glob("*/__init__.py")):
        parts[sub.name] = sorted(sub.rglob("*.py"))
    below = {
        part: set().union(*(parts_imported(path, name) for path in paths)) & parts.keys() - {part}
        for part, paths in parts.items()
    }
    while leaves := [part for part, needed in below.items() if not needed]:
        below = {part: needed - set(leaves) for part, needed in below.items() if part not in leaves}
    assert not below, f"import each other: {below}"


def test_every_module_that_is_imported_exists() -> None:
    # Imports inside functions, too, which no type checker and no import of the file itself would miss.
    missing = set()
    for path in (file for package in (*MAY_IMPORT, "scripts", "tests") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.split(".")[0] in MAY_IMPORT and not (
                (ROOT / module.replace(".", "/")).is_dir() or (ROOT / f"{module.replace('.', '/')}.py").exists()
            ):
                missing.add(f"{path.relative_to(ROOT)}: {module}")
    assert not missing


def test_types_of_public_modules_are_checked_strictly() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    (patterns,) = (
        name.removeprefix("mypy-").split(",")
        for name, options in config.items()
        if options.get("disallow_untyped_defs") == "True"
    )
    for module in sorted(set(retriever._PUBLIC.values())):
        # A pattern index.files.* covers index.files, too.
        assert module in patterns or any(
            f"{module}.".startswith(pattern[:-1]) for pattern in patterns if pattern.endswith(".*")
        ), module


@pytest.mark.parametrize("module", ["retriever", "retriever.cli.command_line", "index.files"])
def test_importing_the_project_loads_no_heavy_library(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'faiss', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
