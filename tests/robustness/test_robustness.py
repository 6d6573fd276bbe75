"""Hostile input, kills, full disks and low limits end in one line, and nothing is lost. See docs/design/robustness.md.

The long run is `pytest -m slow tests/robustness`; ROBUSTNESS_CASES, ROBUSTNESS_KILLS and ROBUSTNESS_SEED change it, and
ROBUSTNESS_OUT is a folder for its figures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forks import LoadedPython, environment
from scenarios import SCENARIOS

HERE = Path(__file__).resolve().parent
# Readers that take milliseconds.
SAMPLE = (
    *("configuration", "pairs csv", "pairs parquet", "qrels gz", "run", "BEIR folder", "store", "index", "checkpoint"),
    *(
        "resealed checkpoint",
        "saved dataset",
        "tar",
        "image table jsonl",
        "metrics",
        "image image.webp",
        "command line",
    ),
)


# Commands that write no file, and the upload, which needs a network.
NOT_DISTURBED = {"search", "serve", "index verify", "push"}


def test_every_command_that_writes_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE.parents[1] / "docs")
    from reference_pages import COMMANDS

    disturbed = {command for command in COMMANDS if any(name.startswith(command) for name in SCENARIOS)}
    assert disturbed == COMMANDS.keys() - NOT_DISTURBED


def test_a_sample_of_mutated_inputs_and_disturbed_commands(python: LoadedPython, tmp_path: Path) -> None:
    words = ("--seed", 1, "--work", tmp_path)
    readers = [word for name in SAMPLE for word in ("--reader", name)]
    found = python.run(HERE / "fuzz.py", "--count", 90, *readers, *words)
    assert found.returncode == 0, found.stdout + found.stderr
    assert " cases, 0 faults" in found.stdout
    commands = ("--command", "encode", "--command", "split")
    found = python.run(HERE / "disturb.py", "--kills", 4, "--disks", 2, *commands, *words)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "4 kills" in found.stdout and "0 faults" in found.stdout


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("script", ["fuzz", "disturb"])
def test_many_mutated_inputs_and_disturbed_commands(script: str, tmp_path: Path) -> None:
    cases, kills = (
        int(os.environ.get(f"ROBUSTNESS_{name}", count)) for name, count in (("CASES", 20_000), ("KILLS", 200))
    )
    counts = ["--count", cases]
    if script == "disturb":
        counts = ["--kills", kills, "--disks", kills // 2, "--limits", kills // 2, "--pairs", kills // 4]
    out = Path(os.environ.get("ROBUSTNESS_OUT", tmp_path)) / f"robustness_{script}.csv"
    words = [HERE / f"{script}.py", *counts, "--seed", os.environ.get("ROBUSTNESS_SEED", "1"), "--csv", out]
    done = subprocess.run([sys.executable, *map(str, words)], env=environment(), check=False)
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("script", ["leaks", "service"])
def test_long_processes_stay_flat_and_services_answer(script: str) -> None:
    pytest.importorskip("uvicorn")
    done = subprocess.run([sys.executable, str(HERE / f"{script}.py")], env=environment(), check=False)
    assert done.returncode == 0
