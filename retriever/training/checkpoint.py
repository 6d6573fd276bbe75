"""Checkpoints: tensors as safetensors, numbers as JSON, checksums over both; whole or absent."""

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
    """What a run has reached, beside its tensors; the random numbers of a step follow from the seed and the step."""

    step: int = 0
    """Optimizer steps done."""
    dev_step: int = -1
    """Step of the last dev evaluation."""
    best_score: float | None = None
    """Best dev nDCG@10 (of pictures: recall@1, acc1); the model folder holds that model."""
    best_step: int = 0
    """Step of the best dev evaluation."""
    evaluations_without_gain: int = 0
    """Dev evaluations since the best one."""
    sources: tuple[str, ...] = ()
    """sha256 of every data source's examples; a run goes on only with the same data."""
    dev: str = ""
    """Fingerprint of the dev set, for the same reason."""
    scaler: dict[str, float] | None = None
    """The loss scale of fp16 training and its counter."""


def save_checkpoint(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, state: TrainState, *, writes: bool
) -> None:
    """Write modules, optimizer state and `state` to `folder`, atomically.

    All processes of a job call it, and one `writes`: whole tensors, which the others help to gather.
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
    """Put a checkpoint's tensors into the modules and the optimizer, on the devices they are on, divided as these are.

    Raises:
        InputError: the checkpoint is torn, or was made with another model or optimizer.
    """
    verify_files(read_manifest(folder, CHECKPOINT), "hash")
    for name, module in modules.items():
        try:
            saved_tensors, present = load_file(folder / f"{name}.safetensors"), module.state_dict()
            module.load_state_dict({k: distribute_like(v, present.get(k, v)) for k, v in saved_tensors.items()})
        except (RuntimeError, FileNotFoundError) as error:
            # torch begins with a line that says no more.
            found = str(error).splitlines()
            raise InputError(
                f"{folder}: does not fit this run's {name}: {found[min(1, len(found) - 1)].strip()}"
            ) from None
    saved = read_json(folder / "state.json")
    _restore_optimizer(optimizer, {**load_file(folder / "optimizer.safetensors"), **saved["optimizer"]})
    fields = saved["train"]
    return TrainState(**{**fields, "sources": tuple(fields["sources"])})


def checkpoint_digest(folder: Path) -> str:
    """sha256 of the sums of a checkpoint's files, which `load_checkpoint` checks."""
    files = read_manifest(folder, CHECKPOINT).files
    return hashlib.sha256("\n".join(f"{name} {files[name].sha256}" for name in sorted(files)).encode()).hexdigest()


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint of the highest step, or none. One that a killed run was about to replace is put back first."""
    for name in {path.name.split(".")[1] for path in checkpoints.glob(".step-*.old")}:
        recover_folder(checkpoints / name)
    found = _all_checkpoints(checkpoints)
    return found[-1] if found else None


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return checkpoints / f"step-{step:08d}"


def prune_checkpoints(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    for folder in _all_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(folder)


def _all_checkpoints(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors and numbers of the optimizer's state, keyed "parameter number/entry"."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for parameter, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            place: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
            place[f"{parameter}/{name}"] = value
    return tensors, numbers


def _restore_optimizer(optimizer: torch.optim.Optimizer, entries: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in entries.items():
        number, _, name = key.partition("/")
        divided = distribute_like(value, parameters[int(number)]) if isinstance(value, Tensor) else value
        state.setdefault(int(number), {})[name] = divided
    # The settings of the groups (rates, decay) are the configuration's.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
