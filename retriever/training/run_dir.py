"""The folder of a training run: configuration, checkpoints, model, lock, and removal after a failed start."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from index.files import InputError, atomic_folder, locked_folder, recover_folder
from index.files.disk_space import check_free_space
from index.progress import Reporter
from index.store.reader import EmbeddingStore
from retriever.config.lora import LoraConfig
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import CONFIG_FILE, load_config, save_config
from retriever.data.source_prompts import save_source_prompts
from retriever.distributed.agreement import ContentHash
from retriever.distributed.ranks import Ranks
from retriever.models.card.card import ModelCard, write_card
from retriever.models.loading.checksums import write_checksums
from retriever.models.loading.lora import merged_weights
from retriever.models.loading.quantized_linear import QuantizedLinear
from retriever.models.modality import build_any_towers, embeds_images
from retriever.models.passage_side import write_passage_model
from retriever.models.sharded_tensors import gather_tensors
from retriever.training.checkpoint import (
    DamagedCheckpointError,
    TrainState,
    all_checkpoints,
    checkpoint_digest,
    checkpoint_folder,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    set_aside,
)
from retriever.training.tracking.plot import PLOT_FILE
from retriever.training.tracking.run_log import METRICS_FILE
from retriever.training.tracking.trackers import TRACKERS_FILE

CACHE = "cache"

# Bytes above which the cache of a failed start is kept, because the next start would have to read the data again.
MIN_KEPT_CACHE_BYTES = 2**20


class RunFolder:
    """Reads and writes the folder of a run.

    Only rank 0 writes. Every rank must call the methods, because sharded tensors are gathered from all ranks.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self.ranks = path, ranks
        self._saved_steps = (-1, -1)
        self.loaded: ContentHash | None = None
        """The checkpoint that `load_newest` has loaded."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that locks the folder against other jobs."""
        return locked_folder(self.path) if self.ranks.is_first else contextlib.nullcontext()

    def begin(self, config: TrainConfig) -> None:
        """Write the configuration of a new run.

        Raises:
            InputError: another job has started a run in this folder.
        """
        if self.ranks.is_first:
            # The folder may not exist yet if data.cache is elsewhere.
            self.path.mkdir(parents=True, exist_ok=True)
            with self.locked():
                _check_unused(self.path)
                self.ranks.mark_started(config.out)
                save_config(config, self.path / CONFIG_FILE)

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint has been saved."""
        return any((self.path / "checkpoints").glob("step-*"))

    def load_newest(
        self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, report: Callable[[str], None]
    ) -> TrainState | None:
        """Load the newest checkpoint that is whole into modules and optimizer.

        Damaged checkpoints that are newer are reported and renamed to damaged-STEP.

        Returns:
            The state of the checkpoint, or None if there is no checkpoint.

        Raises:
            InputError: all checkpoints are damaged, or the newest one was saved with another model or optimizer.
        """
        if self.ranks.is_first:
            recover_folder(self.path / "model")
        damaged: dict[Path, str] = {}
        for newest in reversed(all_checkpoints(self.path / "checkpoints")):
            try:
                state = load_checkpoint(newest, modules, optimizer)
                break
            except DamagedCheckpointError as error:
                damaged[newest] = str(error)
        else:
            if damaged:
                raise InputError(
                    f"{next(iter(damaged.values()))}; no whole checkpoint is left: remove {self.path / 'checkpoints'} "
                    f"to start from the beginning"
                )
            return None
        if self.ranks.is_first:
            for folder, problem in damaged.items():
                report(f"{problem}; renamed to {set_aside(folder).name}, falling back to {newest.name}")
        self.loaded = ContentHash(checkpoint_digest(newest), str(newest))
        self._saved_steps = state.step, state.dev_step
        return state

    def save_checkpoint(
        self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, state: TrainState, keep: int
    ) -> None:
        """Save a checkpoint unless the newest one has the same state, and remove all but the newest `keep`."""
        checkpoints = self.path / "checkpoints"
        # A checkpoint saved when an evaluation was interrupted lacks its result.
        if (state.step, state.dev_step) != self._saved_steps:
            folder = checkpoint_folder(checkpoints, state.step)
            save_checkpoint(folder, modules, optimizer, state, writes=self.ranks.is_first)
            self._saved_steps = state.step, state.dev_step
        if self.ranks.is_first:
            prune_checkpoints(checkpoints, keep)
        self.ranks.barrier()

    def check_space(self, modules: dict[str, nn.Module], keep: int, lora: LoraConfig) -> None:
        """Check that checkpoints and the model fit on the disk.

        Args:
            modules: what a checkpoint contains.
            keep: number of checkpoints that are kept.
            lora: how the model is saved.

        Raises:
            InputError: the disk is too small.
        """
        if not self.ranks.is_first:
            return
        parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        buffers = [buffer for module in modules.values() for buffer in module.buffers()]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *buffers))
        model = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        if lora.rank and lora.save == "merged":
            # In fp32, whatever the base is stored in.
            layers = [each for module in modules.values() for each in module.modules()]
            packed = sum(each.in_features * each.out_features for each in layers if isinstance(each, QuantizedLinear))
            model = 4 * (packed + sum(parameter.numel() for parameter in parameters))
        # The optimizer has two moments at most. A new checkpoint is written before an old one is removed.
        moments = sum(
            2 * parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad
        )
        needed = (keep + 1) * (weights + moments) + model
        check_free_space(self.path, needed, f"{keep} checkpoints and the model", replaces=self.path / "checkpoints")

    def save_model(self, towers: Any, config: TrainConfig, card: ModelCard, *, sharded: bool) -> None:
        """Write the model folder with its card.

        The weights of sharded towers are gathered first. The updates of LoRA are added to the weights if so configured.
        """
        lora = config.model.lora
        merged = bool(lora.rank) and lora.save == "merged"
        if sharded or merged:
            weights = gather_tensors(towers.state_dict(), keep=self.ranks.is_first)
        if not self.ranks.is_first:
            return
        if merged:
            weights = merged_weights(weights, lora.scaling)
            plain = dataclasses.replace(config.model, lora=LoraConfig(), freeze="none", freeze_layers=0)
            config = dataclasses.replace(config, model=plain)
        if sharded or merged:
            towers = build_configured_towers(config)
            towers.load_state_dict(weights)
        with atomic_folder(self.path / "model") as folder:
            towers.save(folder)
            if config.query_only:
                write_passage_model(folder, towers, EmbeddingStore.open(config.query_only).model)
            write_checksums(folder)
            write_card(folder, towers, card)


class NewRun:
    """Removes what a new run has written if it fails before its first step.

    Args:
        out: the run folder. Folders that do not exist when this object is created are removed.
        cache: the folder of the memory-mapped data. It is kept if it has at least MIN_KEPT_CACHE_BYTES.
        reporter: receives a message if the cache is kept.
    """

    def __init__(self, out: Path, cache: Path, reporter: Reporter) -> None:
        self.out, self.cache, self.reporter = out, cache, reporter
        self.begun = False
        """Whether this run has written its configuration to the folder."""
        self._created = {path for path in (out, *out.parents, cache, *cache.parents) if not path.exists()}

    @contextlib.contextmanager
    def removed_on_failure(self, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Context that removes what was written if the body raises, unless `unless()` is true."""
        try:
            yield
        except BaseException:
            if not unless():
                self._remove()
            raise

    def _remove(self) -> None:
        if not self.begun and (self.out / CONFIG_FILE).exists():
            # Another job has started a run in this folder.
            return
        if self.begun:
            (self.out / CONFIG_FILE).unlink(missing_ok=True)
            # Without a step it has no rows.
            for name in (METRICS_FILE, PLOT_FILE, TRACKERS_FILE):
                (self.out / name).unlink(missing_ok=True)
            shutil.rmtree(self.out / "tensorboard", ignore_errors=True)
        if self.cache in self._created and self.cache.is_dir():
            size = sum(path.stat().st_size for path in self.cache.rglob("*") if path.is_file())
            if size < MIN_KEPT_CACHE_BYTES:
                shutil.rmtree(self.cache, ignore_errors=True)
            else:
                self.reporter.line(f"{self.cache}: kept for the next start, which need not read the data again")
        for folder in sorted(self._created, key=lambda path: len(path.parts), reverse=True):
            # `rmdir` fails for folders that are not empty, which are kept.
            with contextlib.suppress(OSError):
                folder.rmdir()


def cache_folder(config: TrainConfig, run: Path) -> Path:
    """Return the folder of the memory-mapped data: data.cache, or a folder in the run folder."""
    return Path(config.data.cache) if config.data.cache else run / CACHE


def check_new_run(path: Path) -> None:
    """Raise an InputError if a folder contains a run or other files, except for the cache of a failed start."""
    _check_unused(path)
    # A start that was killed may have left a temporary file of its configuration.
    recover_folder(path / CONFIG_FILE)
    others = sorted(entry.name for entry in path.iterdir() if entry.name != CACHE) if path.exists() else []
    if others:
        raise InputError(f"{path}: expected a new or empty folder for the run, found {others[0]} in it")


def load_run_config(path: Path) -> TrainConfig:
    """Load the configuration of the run in a folder.

    Raises:
        InputError: the folder contains no run, or the configuration is damaged.
    """
    if not (path / CONFIG_FILE).exists():
        raise InputError(f"{path}: expected the folder of a run, with {CONFIG_FILE}")
    return load_config(path / CONFIG_FILE)


def build_configured_towers(config: TrainConfig) -> Any:
    """Build the towers of a configuration: for texts, with the prompts of the sources, or for images and texts."""
    towers = build_any_towers(config.model)
    if not embeds_images(towers):
        save_source_prompts(towers, config.data.sources)
    return towers


def _check_unused(path: Path) -> None:
    if (path / CONFIG_FILE).exists():
        raise InputError(
            f"{path}: holds a run already; continue it with 'retriever train --resume {path}', or choose another --out"
        )
