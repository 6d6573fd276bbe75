"""The folder of a training run: its configuration, its checkpoints, its model, and the lock of who trains there."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from index.files import InputError, atomic_folder, locked_folder, recover_folder
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import CONFIG_FILE, load_config, save_config
from retriever.data.source_prompts import save_source_prompts
from retriever.distributed.agreement import ContentHash
from retriever.distributed.ranks import Ranks
from retriever.models.loading.hashes import write_sums
from retriever.models.sharded_tensors import gathered
from retriever.models.towers import build_towers
from retriever.training.checkpoint import (
    TrainState,
    checkpoint_digest,
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

CACHE = "cache"


class RunFolder:
    """Written by the first of a run's processes alone; all call the same methods, to gather what they have divided."""

    def __init__(self, path: Path, ranks: Ranks):
        self.path, self.ranks = path, ranks
        self._saved = (-1, -1)
        self.loaded: ContentHash | None = None
        """The checkpoint that `load_newest` has loaded."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """The folder for this job alone."""
        return locked_folder(self.path) if self.ranks.is_first else contextlib.nullcontext()

    def begin(self, config: TrainConfig) -> None:
        """Write the configuration of a new run.

        Raises:
            InputError: another start was quicker.
        """
        if self.ranks.is_first:
            # The cache may lie elsewhere.
            self.path.mkdir(parents=True, exist_ok=True)
            with self.locked():
                _check_unused(self.path)
                self.ranks.mark_started(config.out)
                save_config(config, self.path / CONFIG_FILE)

    @property
    def has_checkpoint(self) -> bool:
        """Whether any has been saved."""
        return any((self.path / "checkpoints").glob("step-*"))

    def load_newest(self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> TrainState | None:
        """Put the newest checkpoint's tensors into the modules and the optimizer; None where there is none.

        Raises:
            InputError: it is torn, or was made with another model or optimizer.
        """
        if self.ranks.is_first:
            recover_folder(self.path / "model")
        newest = latest_checkpoint(self.path / "checkpoints")
        if newest is None:
            return None
        state = load_checkpoint(newest, modules, optimizer)
        self.loaded = ContentHash(checkpoint_digest(newest), str(newest))
        self._saved = state.step, state.dev_step
        return state

    def save_checkpoint(
        self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, state: TrainState, keep: int
    ) -> None:
        """Save what the newest checkpoint does not have yet, and keep the newest few of them."""
        checkpoints = self.path / "checkpoints"
        # One that was made while an evaluation was interrupted does not know of it.
        if (state.step, state.dev_step) != self._saved:
            folder = checkpoint_folder(checkpoints, state.step)
            save_checkpoint(folder, modules, optimizer, state, writes=self.ranks.is_first)
            self._saved = state.step, state.dev_step
        if self.ranks.is_first:
            prune_checkpoints(checkpoints, keep)
        self.ranks.barrier()

    def save_model(self, towers: Any, config: TrainConfig, *, divided: bool) -> None:
        """Write the model folder, whole towers also where they are `divided` among the processes."""
        if divided:
            weights = gathered(towers.state_dict(), keep=self.ranks.is_first)
        if not self.ranks.is_first:
            return
        if divided:
            towers = build_configured_towers(config)
            towers.load_state_dict(weights)
        with atomic_folder(self.path / "model") as folder:
            towers.save(folder)
            write_sums(folder)


def cache_folder(config: TrainConfig, run: Path) -> Path:
    """Where data is kept as training reads it: a place that the configuration names, or in the run's folder."""
    return Path(config.data.cache) if config.data.cache else run / CACHE


def check_new_run(path: Path) -> None:
    """Raises InputError where a run's folder holds a run already, or something else."""
    _check_unused(path)
    # A start that failed leaves a large cache behind.
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name != CACHE) if path.exists() else []
    if foreign:
        raise InputError(f"{path}: expected a new or empty folder for the run, found {foreign[0]} in it")


def load_run_config(path: Path) -> TrainConfig:
    """The configuration of the run in a folder.

    Raises:
        InputError: there is no run, or its configuration is damaged.
    """
    if not (path / CONFIG_FILE).exists():
        raise InputError(f"{path}: expected the folder of a run, with {CONFIG_FILE}")
    return load_config(path / CONFIG_FILE)


def build_configured_towers(config: TrainConfig) -> Any:
    """Towers of texts, with the prompts that they are trained with, or of pictures and texts."""
    if not config.model.image.name:
        towers = build_towers(config.model)
        save_source_prompts(towers, config.data.sources)
        return towers
    from retriever.models.images.towers import build_image_text_towers

    return build_image_text_towers(config.model)


def _check_unused(path: Path) -> None:
    if (path / CONFIG_FILE).exists():
        raise InputError(
            f"{path}: holds a run already; go on with 'retriever train --resume {path}', or choose another --out"
        )
