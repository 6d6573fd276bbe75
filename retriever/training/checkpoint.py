"""Save and load checkpoints: tensors as safetensors, numbers as JSON, with checksums, written atomically."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from index.files import InputError, atomic_folder, read_json, recover_folder, write_json
from index.manifest import CHECKPOINT, FileEntry, Manifest, read_manifest, verify_files, write_manifest
from retriever.models.sharded_tensors import distribute_like, gather_tensors
from retriever.models.weights import save_tensors


@dataclass
class TrainState:
    """The state of a run apart from its tensors. The random numbers of a step depend only on the seed and the step."""

    step: int = 0
    """Number of optimizer steps done."""
    dev_step: int = -1
    """Step of the last dev evaluation; -1 before the first."""
    best_score: float | None = None
    """Best score on the dev set, that of the model in the model folder. None before the first evaluation."""
    best_step: int = 0
    """Step of the best dev evaluation."""
    evaluations_without_gain: int = 0
    """Number of dev evaluations since the best one."""
    sources: tuple[str, ...] = ()
    """sha256 of the examples of each source. A run resumes only with the same data."""
    dev: str = ""
    """Fingerprint of the dev set, which must be the same to resume; empty without one."""
    scaler: dict[str, float] | None = None
    """State of the gradient scaler in fp16 training, otherwise None."""


def save_checkpoint(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, state: TrainState, *, writes: bool
) -> None:
    """Write a checkpoint atomically. Every rank must call it, because sharded tensors are gathered.

    Args:
        folder: folder of the checkpoint.
        modules: modules whose `state_dict` is saved, by name.
        optimizer: the optimizer whose state is saved.
        state: the state of the run.
        writes: whether this rank writes the files.
    """
    tensors, numbers = _optimizer_state(optimizer)
    parts = {**{name: module.state_dict() for name, module in modules.items()}, "optimizer": tensors}
    if not writes:
        for part in parts.values():
            gather_tensors(part, keep=False)
        return
    with atomic_folder(folder) as temporary:
        for name, part in parts.items():
            save_tensors(gather_tensors(part, keep=True), temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", {"train": vars(state), "optimizer": numbers})
        files = {path.name: FileEntry.of(path) for path in sorted(temporary.iterdir())}
        write_manifest(Manifest(temporary, CHECKPOINT, {"step": state.step}, files))


def load_checkpoint(folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> TrainState:
    """Load a checkpoint into modules and optimizer, on the devices and with the sharding of their tensors.

    Raises:
        InputError: the checkpoint is damaged, or was saved with another model or optimizer.
    """
    verify_files(read_manifest(folder, CHECKPOINT), "hash")
    for name, module in modules.items():
        try:
            tensors, own = load_file(folder / f"{name}.safetensors"), module.state_dict()
            module.load_state_dict({k: distribute_like(v, own.get(k, v)) for k, v in tensors.items()})
        except (RuntimeError, FileNotFoundError) as error:
            # The first line of torch's message is only a heading.
            lines = str(error).splitlines()
            raise InputError(
                f"{folder}: does not fit this run's {name}: {lines[min(1, len(lines) - 1)].strip()}"
            ) from None
    saved = read_json(folder / "state.json")
    _restore_optimizer(optimizer, {**load_file(folder / "optimizer.safetensors"), **saved["optimizer"]})
    fields = saved["train"]
    return TrainState(**{**fields, "sources": tuple(fields["sources"])})


def checkpoint_digest(folder: Path) -> str:
    """Return a sha256 over the checksums of the files of a checkpoint."""
    files = read_manifest(folder, CHECKPOINT).files
    return hashlib.sha256("\n".join(f"{name} {files[name].sha256}" for name in sorted(files)).encode()).hexdigest()


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint of the highest step, or None.

    A checkpoint that a killed run was replacing is restored first.
    """
    for name in {path.name.split(".")[1] for path in checkpoints.glob(".step-*.old")}:
        recover_folder(checkpoints / name)
    folders = _all_checkpoints(checkpoints)
    return folders[-1] if folders else None


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def prune_checkpoints(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in _all_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(folder)


def _all_checkpoints(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors and numbers of the optimizer's state, with keys "parameter index/entry"."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for parameter, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            target: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
            target[f"{parameter}/{name}"] = value
    return tensors, numbers


def _restore_optimizer(optimizer: torch.optim.Optimizer, entries: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in entries.items():
        index, _, name = key.partition("/")
        if isinstance(value, Tensor):
            value = distribute_like(value, parameters[int(index)])
        state.setdefault(int(index), {})[name] = value
    # The hyperparameters of the groups come from the configuration.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
