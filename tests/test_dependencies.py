"""What an installation brings is what the packages import."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("retriever", "losses", "index", "eval")


def declared(section: str, option: str) -> list[str]:
    """Names of the distributions that a list of setup.cfg asks for, as registries compare them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config[section][option].split("\n")
    names = [re.match(r"[\w.-]+", line.strip()) for line in lines if line.strip()]
    return [normal(name[0]) for name in names if name is not None]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def imported(folders: tuple[str, ...]) -> set[str]:
    """Distributions whose modules are imported somewhere in the folders, also where it happens within a function."""
    modules: set[str] = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    modules.add((node.module or "").partition(".")[0])
    known = importlib.metadata.packages_distributions()
    return {normal(name) for module in modules for name in known.get(module, [])}


@pytest.mark.parametrize("name", declared("options", "install_requires"))
def test_every_hard_dependency_is_imported_by_a_package(name: str) -> None:
    assert name in imported(PACKAGES)


@pytest.mark.parametrize("extra", ["gpu", "hub", "bm25", "plot", "lora", "serve"])
def test_every_extra_is_imported_by_a_package(extra: str) -> None:
    assert set(declared("options.extras_require", extra)) <= imported(PACKAGES)


def test_what_only_tests_and_benchmarks_import_comes_with_the_tests() -> None:
    assert {"pytrec-eval-terrier", "beir", "mteb", "openai"} <= set(declared("options.extras_require", "test"))
    assert not imported(PACKAGES) & {"pytrec-eval-terrier", "beir", "mteb", "openai", "pytest", "hypothesis"}
