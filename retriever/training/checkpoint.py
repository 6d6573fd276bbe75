"""Save and load checkpoints: tensors as safetensors, numbers as JSON, with checksums, written atomically."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from index.files import InputError, atomic_folder, fsync_folder, read_json, recover_folder, write_json
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
    losses: tuple[float, ...] = ()
    """The recent losses that a new one is compared with, if steps with a loss spike are skipped or rolled back."""
    config: dict[str, Any] = field(default_factory=dict)
    """The configuration, to notice changes; empty in checkpoints of earlier versions."""


class DamagedCheckpointError(InputError):
    """The files of a checkpoint are missing, changed, or not those of a checkpoint."""


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
        DamagedCheckpointError: the checkpoint is damaged.
        InputError: it was saved with another model or optimizer.
    """
    try:
        verify_files(read_manifest(folder, CHECKPOINT), "hash")
        saved = read_json(folder / "state.json")
        state = _parse_state(saved, folder / "state.json")
    except InputError as error:
        raise DamagedCheckpointError(str(error)) from None
    for name, module in modules.items():
        try:
            tensors, own = _load_tensors(folder / f"{name}.safetensors"), module.state_dict()
            module.load_state_dict({k: distribute_like(v, own.get(k, v)) for k, v in tensors.items()})
        except RuntimeError as error:
            # The first line of torch's message is only a heading.
            lines = str(error).splitlines()
            raise InputError(
                f"{folder}: does not fit this run's {name}: {lines[min(1, len(lines) - 1)].strip()}"
            ) from None
    entries = {**_load_tensors(folder / "optimizer.safetensors"), **saved["optimizer"]}
    try:
        _restore_optimizer(optimizer, entries)
    except (ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{folder}: does not fit this run's optimizer: {reason:.200}") from None
    return state


def checkpoint_digest(folder: Path) -> str:
    """Return a sha256 over the checksums of the files of a checkpoint."""
    files = read_manifest(folder, CHECKPOINT).files
    return hashlib.sha256("\n".join(f"{name} {files[name].sha256}" for name in sorted(files)).encode()).hexdigest()


def all_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the checkpoints in order of their steps.

    A checkpoint that a killed run was replacing is restored first.
    """
    for name in {path.name.split(".")[1] for path in checkpoints.glob(".step-*.old")}:
        recover_folder(checkpoints / name)
    return _existing_checkpoints(checkpoints)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither loaded nor counted. Returns its new path."""
    renamed = folder.with_name(f"damaged-{folder.name}")
    if renamed.exists():
        shutil.rmtree(renamed)
    folder.rename(renamed)
    fsync_folder(folder.parent)
    return renamed


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def prune_checkpoints(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in _existing_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(folder)


def _existing_checkpoints(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise DamagedCheckpointError(f"{file}: expected tensors, found none that can be read: {error!s:.200}") from None


def _parse_state(saved: Any, file: Path) -> TrainState:
    """Return the state of state.json.

    Raises:
        InputError: a field is missing, unknown, or has the wrong type.
    """
    if not isinstance(saved, dict) or not all(isinstance(saved.get(part), dict) for part in ("train", "optimizer")):
        raise InputError(f"{file}: expected 'train' and 'optimizer', found {saved!r:.60}")
    for name, value in saved["optimizer"].items():
        if not re.fullmatch(r"\d{1,9}/.+", name) or not isinstance(value, int | float):
            raise InputError(f"{file}: optimizer: expected numbers, found {name!r:.60}: {value!r:.60}")
    types = get_type_hints(TrainState)
    # Checkpoints of earlier versions lack the fields that came later.
    fields = {**asdict(TrainState()), **saved["train"]}
    if "step" not in saved["train"] or fields.keys() != types.keys():
        raise InputError(f"{file}: expected {', '.join(types)}, found {', '.join(saved['train']):.200}")
    for name, kind in (("sources", str), ("losses", int | float)):
        values = fields[name]
        is_list = isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)
        fields[name] = tuple(values) if is_list else None
    for name, value in fields.items():
        origin, arguments = get_origin(types[name]), get_args(types[name])
        kinds = (
            (origin,)
            if origin in (tuple, dict)
            else tuple(get_origin(kind) or kind for kind in arguments or (types[name],))
        )
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{file}: {name}: expected {types[name]}, found {value!r:.60}")
    if not 0 <= fields["step"] < 2**63:
        raise InputError(f"{file}: step: expected a number from 0 on, found {fields['step']!r:.60}")
    return TrainState(**fields)


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
    for number, found in state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in found and getattr(found[name], "shape", None) != parameters[number].shape:
                raise ValueError(f"{number}/{name}: expected the shape {[*parameters[number].shape]}")
    # The hyperparameters of the groups come from the configuration.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
