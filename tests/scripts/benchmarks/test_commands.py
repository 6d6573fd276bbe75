"""The example scripts end with the next commands to type."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import ROOT
from scripts.benchmarks.commands import next_steps


def test_an_inactive_environment_is_activated_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    command = ("search", "--model", tmp_path / "a b" / "model", "--index", Path("/elsewhere/index"), "a query")
    steps = ["  retriever --help", "  retriever search --model 'a b/model' --index /elsewhere/index 'a query'"]
    monkeypatch.delenv("RETRIEVER_ENVIRONMENT", raising=False)
    assert next_steps(command).splitlines()[2:] == steps
    monkeypatch.setenv("RETRIEVER_ENVIRONMENT", str(tmp_path / ".venv"))
    assert next_steps(command).splitlines()[2:] == ["  . .venv/bin/activate", *steps]


@pytest.mark.parametrize("script", ["quickstart.sh", "emoji.sh"])
@pytest.mark.parametrize("active", [True, False])
def test_shell_scripts_pass_an_inactive_environment(script: str, active: bool, tmp_path: Path) -> None:
    """Runs the script with a fake environment and a fake main program."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / script).write_bytes((ROOT / "scripts" / script).read_bytes())
    venv = tmp_path / ".venv"
    (scripts / "environment.sh").write_text(f"ensure_environment() {{ export VIRTUAL_ENV={venv}; }}\n")
    (scripts / script.replace(".sh", ".py")).write_text("import os; print(os.environ.get('RETRIEVER_ENVIRONMENT'))")
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "RETRIEVER_ENVIRONMENT")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["bash", str(scripts / script)],
        env=env | ({"VIRTUAL_ENV": str(venv)} if active else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ("None" if active else str(venv))
