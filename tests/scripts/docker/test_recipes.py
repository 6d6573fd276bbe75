"""The recipes of containers copy files that exist and install extras that exist, and their commands are accepted."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import pytest
import yaml

from retriever.cli.command_line import main
from scripts import ROOT

DOCKER = ROOT / "scripts" / "docker"
RECIPES = sorted(DOCKER.glob("*.Dockerfile"))
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")


def instructions(path: Path, name: str) -> list[str]:
    """The arguments of the instructions of one kind, with continued lines joined."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.removeprefix(f"{name} ") for line in text.splitlines() if line.startswith(f"{name} ")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_copies_the_packages_and_installs_known_extras(path: Path) -> None:
    copied = [source for line in instructions(path, "COPY") for source in line.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    packages = {name.rstrip("*") for name in CONFIG["options.packages.find"]["include"].split()}
    assert packages <= set(copied) and {"setup.cfg", "pyproject.toml", "constraints.txt"} <= set(copied)
    # Files that setup.cfg reads while it installs.
    assert set(CONFIG["metadata"]["license_files"].split()) | {"README.md"} <= set(copied)
    [extras] = [found[1] for line in instructions(path, "RUN") if (found := re.search(r'"\.\[([\w,]+)\]"', line))]
    assert set(extras.split(",")) <= set(CONFIG["options.extras_require"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_torch_of_the_constraints_is_installed(path: Path) -> None:
    [pattern] = re.findall(r"sed -n 's/(.*?)/\\1/p' constraints", path.read_text(encoding="utf-8"))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = [
        found[1] for line in lines if (found := re.match(pattern.replace(r"\(", "(").replace(r"\)", ")"), line))
    ]
    assert len(versions) == 1 and re.fullmatch(r"==\d+\.\d+\.\d+", versions[0])


def test_the_conda_environment_installs_known_extras() -> None:
    path = DOCKER / "environment.yml"
    environment = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(environment) == {"name", "channels", "dependencies"} and "pip" in environment["dependencies"]
    [extras] = re.findall(r'"\.\[([\w,]+)\]"', path.read_text(encoding="utf-8"))
    assert set(extras.split(",")) <= set(CONFIG["options.extras_require"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_of_a_recipe_are_accepted(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8").replace("\\\n#", " ")
    runs = re.findall(rf"^#   docker run .*? dense-retriever:{path.stem} +(.*)$", text, re.MULTILINE)
    runs = [run if "-m retriever" not in run else run.partition("-m retriever ")[2] for run in runs]
    assert runs
    for run in runs:
        # A mistake in the arguments would be named by its flag; here only the files are missing.
        assert main(shlex.split(run)) in (1, 2)
        assert "no such" in (errors := capsys.readouterr().err) and "--" not in errors, errors
