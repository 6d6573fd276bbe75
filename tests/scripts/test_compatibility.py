"""The oldest allowed versions are the lower bounds of setup.cfg, and an environment that cannot be tested is named."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from scripts import compatibility


def test_every_requirement_has_a_lower_bound_that_the_oldest_versions_pin() -> None:
    config = (compatibility.ROOT / "setup.cfg").read_text()
    lines = config.partition("install_requires =")[2].partition("[options.packages.find]")[0].split()
    oldest = compatibility.constraints("oldest")
    assert lines and [line.replace(">=", "==") for line in lines] == oldest[: len(lines)]
    assert {line.partition("==")[0] for line in oldest} >= set(compatibility.SHOWN) | {"peft", "datasets"}


def test_the_newest_torch_is_that_of_the_constraints() -> None:
    (line,) = compatibility.constraints("newest")
    pinned = re.search(r"^torch==(.*)$", (compatibility.ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and line == f"torch<={pinned[1]}"


def test_the_tests_and_the_supported_pythons_exist() -> None:
    assert all((compatibility.ROOT / test).exists() for test in compatibility.TESTS)
    stated = re.findall(r"Python :: (3\.\d+)", (compatibility.ROOT / "setup.cfg").read_text())
    assert stated == list(compatibility.PYTHONS)


def _program(folder: Path, name: str, lines: str) -> Path:
    folder.mkdir()
    program = folder / name
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    return program


def test_a_python_that_does_not_start_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the shims of pyenv are, for versions that are installed but not chosen.
    broken = _program(tmp_path / "a", "python3.99", "exit 127")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", str(broken.parent))
    assert compatibility.find_python("3.99") is None
    working = _program(tmp_path / "b", "python3.99", "echo 3.99")
    monkeypatch.setenv("PATH", f"{broken.parent}:{working.parent}")
    assert compatibility.find_python("3.99") == str(working)


def test_a_missing_python_is_a_row_of_the_table_and_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compatibility.py", "--python", "3.99", "--versions", "newest", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert compatibility.main() == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| 3.99 | newest |") and "no working python3.99 found" in last


@pytest.mark.parametrize(
    ("code", "closing"), [(0, "3 passed in 1s"), (1, "1 failed, 2 passed in 1s"), (5, "none ran in 0.1s")]
)
def test_tests_that_fail_or_do_not_run_fail(
    code: int, closing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `python -m venv` makes an environment whose Python lists torch, and ends the tests with the code.
    tests = f'echo "== {closing} =="; echo refleaks; exit {code}'
    inside = rf'case "$*" in *freeze*) echo torch==2.11.0;; *-m\ pytest*) {tests};; esac'
    made = f'mkdir -p "$4/bin"; printf "%s\\n" "#!/bin/sh" \'{inside}\' > "$4/bin/python"; chmod +x "$4/bin/python"'
    python = _program(tmp_path / "bin", "python3.99", made)
    monkeypatch.setattr(compatibility, "find_python", lambda version: str(python))
    result = compatibility.run_tests("3.99", "oldest", tmp_path)
    assert result.passed == (code == 0) and result.outcome.startswith(closing)
    assert result.installed == {"torch": "2.11.0"}
    assert "| 3.99 | oldest | 2.11.0 |" in compatibility.table([result])
