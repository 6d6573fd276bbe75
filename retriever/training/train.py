"""The public function `retriever.train`, which trains a model by a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.progress import Progress, Reporter, SilentReporter, as_reporter
from index.records import read_records
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import (
    CONFIG_FILE,
    config_from_mapping,
    load_config,
    with_absolute_paths,
    with_overrides,
)
from retriever.distributed.agreement import compared_settings
from retriever.distributed.context import joined_ranks, uses_gpus
from retriever.distributed.ranks import DryRunRanks, Ranks
from retriever.encoding.model import Model, load
from retriever.errors import ArgumentError, ConfigError, check_paths
from retriever.training.memory_plan import MemoryPlan
from retriever.training.run_dir import NewRun, cache_folder, load_run_config
from retriever.training.trainer import Trainer
from retriever.utils.interrupt import Interrupted
from retriever.utils.torchrun import restart_count


@dataclass(frozen=True)
class TrainingRun:
    """A finished training run.

    Attributes:
        folder: Folder of the run: config.yaml, metrics.jsonl, checkpoints/, model/.
        step: Number of the last optimizer step.
        dev_metric: Name of the measure on the dev set by which the model was chosen; "" without a dev set.
        best_score: Its best value, in [0, 1]; None without a dev set.
        best_step: The step of the kept model; None without a dev set.
    """

    folder: Path
    step: int
    dev_metric: str = ""
    best_score: float | None = None
    best_step: int | None = None

    @property
    def model_folder(self) -> Path:
        """Folder of the model, which sentence-transformers reads too."""
        return self.folder / "model"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: loss, learning rate and rates of the logged steps, and dev measures."""
        return [record.fields for record in read_records(self.folder / "metrics.jsonl")]

    @property
    def model(self) -> Model:
        """The model, loaded on each access."""
        return load(self.model_folder)


def train(
    config: str | Path | TrainConfig | Mapping[str, Any] | None = None,
    *,
    resume: str | Path | None = None,
    profile: bool = False,
    progress: Progress = None,
    **overrides: Any,
) -> TrainingRun:
    """Train a model.

    Under torchrun every process calls this function, and each takes its share of every batch.

    Args:
        config: A YAML file, a `TrainConfig`, or a mapping with the keys of the YAML file. Default: None, only
            `overrides`.
        resume: Folder of a run to continue from its last checkpoint with its own configuration, instead of `config`.
            Default: None.
        profile: Whether to report where the time of three early steps goes, and to write a trace of them to the run's
            folder. Default: False.
        progress: Called with a `ProgressEvent` at each step. Default: None, messages go to the logger "retriever".
        **overrides: Fields of the configuration that replace those of `config`: `batch_size=1024`, a section as a
            mapping, `optim={"lr": 1e-4}`, or a field of a section by its own name where only one section has it,
            `lr=1e-4`.

    Returns:
        The run: its folder, the last step, the best dev score and the model.

    Raises:
        ConfigError: The configuration is invalid, or the folder `out` already contains a run.
        InputError: The model or the data cannot be read, or the loss is not finite.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; a checkpoint has been saved, and `resume` continues the run.
    """
    if resume is not None:
        if config is not None or overrides:
            raise ConfigError("resume: a run continues with its own configuration; give no config and no other field")
        check_paths(resume=resume)
        resolved = TrainConfig()
    else:
        resolved = with_overrides(as_config(config), overrides)
    on_gpus = uses_gpus(resolved.device)
    same = {"command": "train", "--resume": resume is not None, "--profile": profile}
    same |= {"device": "cuda" if on_gpus else "cpu", **compared_settings(resolved)}
    with joined_ranks(same, on_devices=on_gpus) as ranks:
        reporter = as_reporter(progress) if ranks.is_first else SilentReporter()
        trainer = _trainer(resolved, resume, reporter, ranks, profile)
        try:
            with trainer.removed_on_early_failure():
                trainer.train(profile=profile)
        except Interrupted as interrupted:
            interrupted.run, interrupted.step = trainer.run, trainer.state.step
            raise
        state = trainer.state
        best_step = None if state.best_score is None else state.best_step
        return TrainingRun(trainer.run, state.step, trainer.dev_metric, state.best_score, best_step)


def plan_run(
    config: TrainConfig, *, resume: str | Path | None = None, processes: int = 1, progress: Progress = None
) -> MemoryPlan:
    """The memory that each process of a run will need, without training.

    Args:
        config: The configuration.
        resume: Folder of a run to plan instead. Default: None.
        processes: Number of processes. Default: 1.
        progress: Called with a `ProgressEvent` at each step. Default: None.
    """
    reporter = as_reporter(progress)
    config = with_absolute_paths(config if resume is None else load_run_config(Path(resume)))
    folder = Path(config.out if resume is None else resume)
    with NewRun(folder, cache_folder(config, folder), reporter).removed_on_failure():
        return Trainer(config, folder, reporter, DryRunRanks(world_size=processes)).plan()


def as_config(config: str | Path | TrainConfig | Mapping[str, Any] | None) -> TrainConfig:
    """Return the configuration that a caller gave as a file, a mapping or a TrainConfig.

    Raises:
        ConfigError: it is something else, or invalid.
    """
    if config is None:
        return TrainConfig()
    if isinstance(config, TrainConfig):
        return config
    if isinstance(config, str | Path):
        check_paths(config=config)
        return load_config(Path(config))
    if not isinstance(config, Mapping):
        raise ArgumentError("config", f"expected a file, a TrainConfig or a mapping, found {type(config).__name__}")
    return config_from_mapping(config)


def _trainer(
    config: TrainConfig, resume: str | Path | None, reporter: Reporter, ranks: Ranks, profile: bool
) -> Trainer:
    if resume is not None:
        return Trainer.resume(Path(resume), reporter, ranks)
    if ranks.broadcast(ranks.is_first and _is_restarted(config, ranks)):
        return Trainer.resume(Path(config.out), reporter, ranks)
    return Trainer.start(config, reporter, ranks, profile=profile)


def _is_restarted(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether torchrun restarted this process after a failure of a job that had begun this run."""
    written = Path(config.out) / CONFIG_FILE
    if not restart_count() or not written.exists() or not ranks.has_started(config.out):
        return False
    begun = load_config(written)
    asked = with_absolute_paths(config)
    # The trainer resolved these two fields before it wrote them.
    tokens = asked.micro_batch_tokens or begun.micro_batch_tokens
    precision = begun.precision if asked.precision == "auto" else asked.precision
    return begun == dataclasses.replace(asked, precision=precision, micro_batch_tokens=tokens)
