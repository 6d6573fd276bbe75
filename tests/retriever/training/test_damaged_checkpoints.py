"""A damaged newest checkpoint is set aside and the one before it continues the run; no file of one is a traceback."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import command, write_config, write_pairs
from run_helpers import assert_same, results
from safetensors.torch import load_file, save_file

from index.files import InputError
from index.manifest import FileEntry, read_manifest, write_manifest
from retriever.cli.terminal import Terminal
from retriever.config.run import ModelConfig
from retriever.training.trainer import Trainer


@pytest.fixture(scope="module")
def whole(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    pairs = write_pairs(folder / "pairs.jsonl")
    config = write_config(folder / "run.yaml", tiny, pairs, steps=6, checkpoint_every=4, log_every=1)
    outcome = command("train", config)
    assert outcome.code == 0, outcome.err
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(whole: Path, run: Path) -> None:
    newest = run / "checkpoints" / "step-00000006"
    data = bytearray((newest / "towers.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "towers.safetensors").write_bytes(data)
    outcome = command("train", "--resume", run)
    assert outcome.code == 0, outcome.err
    shown = outcome.out + outcome.err
    assert "damaged-step-00000006, falling back to step-00000004" in shown and "towers.safetensors: damaged" in shown
    shutil.rmtree(run / "checkpoints" / "damaged-step-00000006")
    assert_same(results(run), results(whole))


def test_without_a_whole_checkpoint_the_message_says_what_to_remove(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    outcome = command("train", "--resume", run)
    assert outcome.code == 1 and f"remove {run / 'checkpoints'} to start from the beginning" in outcome.err
    shutil.rmtree(run / "checkpoints")
    assert Trainer.resume(run, Terminal()).state.step == 0


def _state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        change(state)
        (folder / "state.json").write_text(json.dumps(state))

    return apply


def _tensors(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return apply


def _without_shape(tensors: dict[str, Any]) -> None:
    key = next(key for key in tensors if key.endswith("exp_avg"))
    tensors[key] = tensors[key].flatten()[:3].clone()


RESEALED = {
    "no train": _state(lambda state: state.pop("train")),
    "no step": _state(lambda state: state["train"].pop("step")),
    "text step": _state(lambda state: state["train"].update(step="6")),
    "huge step": _state(lambda state: state["train"].update(step=10**30)),
    "unknown field": _state(lambda state: state["train"].update(extra=1)),
    "list": lambda folder: (folder / "state.json").write_text("[]"),
    "optimizer key": _state(lambda state: state["optimizer"].update({"x/step": 1})),
    "no tensors": lambda folder: (folder / "towers.safetensors").write_bytes(b"garbage"),
    "no file": lambda folder: (folder / "loss.safetensors").unlink(),
    "moment shape": _tensors("optimizer.safetensors", _without_shape),
    "moment index": _tensors(
        "optimizer.safetensors", lambda t: t.update({"9999/exp_avg": next(iter(t.values())).clone()})
    ),
    "tower key": _tensors("towers.safetensors", lambda tensors: tensors.pop(next(iter(tensors)))),
}


def test_resealed_checkpoints_are_refused_in_one_line(whole: Path, tmp_path: Path) -> None:
    """The sums of these checkpoints are right; their content is not that of a checkpoint of this run."""
    trainer = Trainer.resume(whole, Terminal())
    for name, change in RESEALED.items():
        checkpoint = tmp_path / name.replace(" ", "_")
        shutil.copytree(whole / "checkpoints" / "step-00000006", checkpoint)
        change(checkpoint)
        manifest = read_manifest(checkpoint)
        files = {file.name: FileEntry.of(file) for file in checkpoint.iterdir() if file.name != "manifest.json"}
        write_manifest(dataclasses.replace(manifest, files=files))
        with pytest.raises(InputError) as error:
            from retriever.training.checkpoint import load_checkpoint

            load_checkpoint(checkpoint, trainer.components.modules, trainer.optimizer)
        assert str(checkpoint) in str(error.value) and "\n" not in str(error.value), name
