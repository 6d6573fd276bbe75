"""A start that fails before its first step removes what it has written and nothing else."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import command, write_config, write_lines, write_pairs

from index.files import InputError
from retriever.cli.terminal import Terminal
from retriever.config.model import ModelConfig
from retriever.training import run_dir
from retriever.training.run_dir import RunFolder, check_new_run
from retriever.training.step import TrainStep


@pytest.fixture
def config(tiny: ModelConfig, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", tiny, write_pairs(tmp_path / "pairs.jsonl"))


def failing(*_: Any, **__: Any) -> Any:
    raise out_of_memory()


def out_of_memory() -> RuntimeError:
    return type("OutOfMemoryError", (RuntimeError,), {})("out of memory")


BEFORE_THE_FIRST_STEP: dict[str, tuple[str, ...]] = {
    "a source that is not there": ("--data.sources.0.path", "nothing.jsonl"),
    "a bad row": ("--data.sources.0.path", "bad.jsonl"),
    "too few rows": ("--batch-size", "61"),
    "no dev set": ("--dev.path", "nothing"),
    "no such model": ("--model.name", "nobody/nothing"),
    "a profile of too few steps": ("--profile", "--steps", "2"),
    "a plan": ("--dry-run", "--batch-size", "61"),
    "a write that fails": (),
    "a step that fails": ("--tensorboard",),
}


@pytest.mark.parametrize("what", BEFORE_THE_FIRST_STEP)
@pytest.mark.parametrize("out", ["a/b/run", "there"])
def test_a_failed_start_leaves_no_files(
    config: Path, tmp_path: Path, what: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "bad.jsonl", [{"question": "q", "answer": "a"}] * 99 + ["{"])
    (tmp_path / "there").mkdir()
    if what == "a write that fails":
        monkeypatch.setattr(RunFolder, "begin", failing)
    if what == "a step that fails":
        monkeypatch.setattr(TrainStep, "__call__", failing)
    before = sorted(tmp_path.rglob("*"))
    outcome = command("train", config, "--out", out, *BEFORE_THE_FIRST_STEP[what])
    assert outcome.code in (1, 2), outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_files_are_kept(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "cache").mkdir(parents=True)
    (tmp_path / "run" / "cache" / "mine").write_text("x")
    outcome = command("train", config, "--batch-size", "61")
    assert outcome.code == 1
    assert (tmp_path / "run" / "cache" / "mine").read_text() == "x"
    # The cache of the failed start does not prevent a run in the folder.
    assert command("train", config, "--steps", "1").code == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"config.yaml", "model", "cache"}
    # A refused start does not change the existing run.
    assert command("train", config).code == 1
    assert (tmp_path / "run" / "model" / "modules.json").exists()


def test_a_large_cache_is_kept_and_reported(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "MIN_KEPT_CACHE_BYTES", 100)
    outcome = command("train", config, "--batch-size", "61")
    assert f"{tmp_path / 'run' / 'cache'}: kept for the next start" in outcome.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"]
    assert command("train", config, "--steps", "1").code == 0


def test_a_run_of_another_job_is_kept(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = RunFolder.begin

    def begin_twice(self: RunFolder, config: Any) -> None:
        begin(self, config)
        begin(self, config)

    monkeypatch.setattr(RunFolder, "begin", begin_twice)
    outcome = command("train", config)
    assert outcome.code == 1 and "holds a run already" in outcome.err
    assert (tmp_path / "run" / "config.yaml").exists() and any((tmp_path / "run" / "cache").iterdir())


def test_a_run_that_failed_after_its_first_step_can_be_resumed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = TrainStep.__call__, iter(range(9))

    def second_fails(self: TrainStep, *arguments: Any, **options: Any) -> Any:
        return failing() if next(calls) else step(self, *arguments, **options)

    with monkeypatch.context() as changed:
        changed.setattr(TrainStep, "__call__", second_fails)
        assert command("train", config, "--steps", "3").code == 1
    assert (tmp_path / "run" / "config.yaml").exists()
    assert command("train", "--resume", tmp_path / "run").code == 0


@contextlib.contextmanager
def suppressed_interrupt() -> Iterator[None]:
    with contextlib.suppress(KeyboardInterrupt):
        yield


def test_ctrl_c_removes_created_folders(tmp_path: Path) -> None:
    new = run_dir.NewRun(tmp_path / "runs" / "first", tmp_path / "elsewhere" / "cache", Terminal())
    with suppressed_interrupt(), new.removed_on_failure():
        (tmp_path / "elsewhere" / "cache").mkdir(parents=True)
        (tmp_path / "runs" / "second").mkdir(parents=True)
        raise KeyboardInterrupt
    # A folder that was created next to the run is kept.
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["runs", "second"]


def test_what_a_killed_start_left_of_its_configuration_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".config.yaml.0123abcd.tmp"
    left.touch()
    check_new_run(tmp_path)
    assert not left.exists()
    left.touch()
    # Another job is writing it.
    with open(left) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="expected a new or empty folder"):
            check_new_run(tmp_path)
