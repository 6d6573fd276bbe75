"""The trainer: start, resume, plan and train a run in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from index.files import InputError
from index.progress import Reporter
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import with_absolute_paths
from retriever.distributed.agreement import check_same_folder, check_same_on_ranks
from retriever.distributed.ranks import Ranks
from retriever.training.checkpoint import TrainState
from retriever.training.components import build_components
from retriever.training.health.config_change import config_tree, describe_changes
from retriever.training.loop import TrainingLoop
from retriever.training.memory_plan import MemoryPlan, plan_step
from retriever.training.objective.further_memory import further_memory
from retriever.training.profiler import STEPS, WARM_UP
from retriever.training.run_dir import NewRun, RunFolder, cache_folder, check_new_run, load_run_config
from retriever.training.tracking.run_card import run_settings
from retriever.training.tracking.run_log import NoLog, RunLog
from retriever.training.tracking.trackers import check_trackers
from retriever.utils.interrupt import Interrupted, StopRequest
from retriever.utils.torchrun import restart_count
from retriever.utils.workers import data_workers


class Trainer:
    """A training run in its folder: `Trainer.start(config)` or `Trainer.resume(run)`, then `.train()`.

    The random numbers of a step depend only on the seed and the step. A run that was interrupted and resumed therefore
    equals an uninterrupted one; on the CPU it is bitwise equal with the same number of threads.

    With several ranks, every rank creates a trainer with the same configuration and calls the same methods. Each rank
    has a share of every batch. Only rank 0 writes to the run folder, which all ranks must see. Configuration, model,
    data, dev set, folder and checkpoint are compared before the first step; if they differ, all ranks raise a
    RanksDifferError.

    Args:
        config: the configuration.
        run: the run folder.
        reporter: shows progress and messages.
        ranks: the ranks. Default: one process.
    """

    def __init__(self, config: TrainConfig, run: Path, reporter: Reporter, ranks: Ranks | None = None) -> None:
        # Before the data is read, which may take long.
        check_trackers(config.trackers)
        self.run = run
        self.reporter = reporter
        self.ranks = ranks or Ranks()
        self._folder = RunFolder(run, self.ranks)
        self._new_run: NewRun | None = None
        self.components = parts = build_components(config, run, reporter, self.ranks)
        self.config = parts.config
        self.device = parts.device
        self.towers = parts.towers
        self.loss = parts.loss
        self.optimizer = parts.optimizer
        self.graphs = parts.graphs
        self.batches = parts.batches
        self.train_step = parts.train_step
        self.state = TrainState(sources=parts.sources, dev=parts.dev_fingerprint, config=config_tree(self.config))

    @classmethod
    def start(
        cls, config: TrainConfig, reporter: Reporter, ranks: Ranks | None = None, *, profile: bool = False
    ) -> Trainer:
        """Start a run in the folder `config.out`.

        Args:
            config: the configuration.
            reporter: shows progress and messages.
            ranks: the ranks. Default: one process.
            profile: whether steps will be profiled. Default: False.

        Raises:
            InputError: the folder contains a run, model or data cannot be read, or the run is too short for a profile.
        """
        config = with_absolute_paths(config)
        out = Path(config.out)
        check_same_folder(ranks or Ranks(), "out", out)
        check_new_run(out)
        new_run = NewRun(out, cache_folder(config, out), reporter)
        is_first = ranks is None or ranks.is_first
        with new_run.removed_on_failure() if is_first else contextlib.nullcontext():
            trainer = cls(config, out, reporter, ranks)
            if profile:
                trainer._check_profile()
            trainer._folder.begin(trainer.config)
            new_run.begun = True
            if restart_count():
                reporter.line(f"{_restart_prefix()}starting from the beginning")
        trainer._new_run = new_run if is_first else None
        return trainer

    @classmethod
    def resume(cls, run: Path, reporter: Reporter, ranks: Ranks | None = None) -> Trainer:
        """Resume a run from its newest whole checkpoint, or from the beginning if it has none.

        Args:
            run: the run folder.
            reporter: shows progress and messages.
            ranks: the ranks. Default: one process.

        Raises:
            InputError: the folder contains no run, all checkpoints are damaged, or the data has changed.
        """
        check_same_folder(ranks or Ranks(), "out", run)
        trainer = cls(load_run_config(run), run, reporter, ranks)
        # Locked, because another job that trains here would replace its checkpoints meanwhile.
        with trainer._folder.locked(), trainer.ranks.first_rank_first():
            trainer._load_newest()
        loaded, state = trainer._folder.loaded, trainer.state
        compared = {"checkpoint": loaded, "step": state.step, "best dev score": state.best_score}
        check_same_on_ranks(trainer.ranks, compared)
        return trainer

    @property
    def dev_metric(self) -> str:
        """Name of the measure that the best model is chosen by; empty without a dev set."""
        dev_set = self.components.dev_set
        return "" if dev_set is None else dev_set.metric

    def plan(self) -> MemoryPlan:
        """Plan the memory of a step on this process, without training."""
        parts = self.components
        stored = parts.train_step.stored
        batch = next(iter(self.batches.loader(start=self.batches.schedule.largest_step)))
        # Images have no guide, teacher or further passages.
        further = (
            None
            if self.config.data.images
            else further_memory(
                self.config,
                batch,
                self.batches,
                None if stored is None else stored.frozen,
                cache_folder(self.config, self.run),
                parts.precision,
                on_gpu=self.device.type == "cuda",
            )
        )
        return plan_step(
            self.config,
            self.towers,
            self.loss,
            self.optimizer,
            self.graphs,
            batch,
            precision=parts.precision,
            ranks=self.ranks.world_size,
            batches_waiting=self.batches.in_memory(
                data_workers(self.config.data.workers, self.device.type, len(self.batches))
            ),
            further=further,
        )

    def train(self, *, profile: bool = False) -> Path:
        """Train to the last step.

        Args:
            profile: whether to report where the time of some of the next steps goes, and to write a trace of them to
                the run folder. Default: False.

        Returns:
            The model folder.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP was received, and a checkpoint has been saved.
            InputError: the loss is not finite, or too few steps are left for a profile.
        """
        if profile:
            self._check_profile()
        with self._folder.locked():
            self._folder.check_space(self.components.modules, self.config.keep_checkpoints, self.config.model.lora)
            log = self._open_log()
            try:
                with StopRequest(self.ranks.any if self.ranks.world_size > 1 else None) as stop:
                    loop = TrainingLoop(self.components, self._folder, self.state, log, stop, self.reporter)
                    try:
                        loop.run(profile=profile)
                    except Interrupted:
                        loop.save_checkpoint()
                        raise
            finally:
                log.close()
        return self.run / "model"

    def removed_on_early_failure(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that removes what a new run has written if the body fails before the first step."""
        if self._new_run is None:
            return contextlib.nullcontext()
        return self._new_run.removed_on_failure(unless=lambda: self.state.step > 0 or self._folder.has_checkpoint)

    def _load_newest(self) -> None:
        parts = self.components
        loaded = self._folder.load_newest(parts.modules, self.optimizer, self.reporter.line)
        if loaded is None:
            self.reporter.line(f"{_restart_prefix()}{self.run}: no checkpoint yet; starting from the beginning")
            return
        if (loaded.sources, loaded.dev) != (self.state.sources, self.state.dev):
            raise InputError(
                f"{self.run}: the data changed since step {loaded.step}; a run resumes only with the same data"
            )
        if changes := describe_changes(loaded.config, self.config, loaded.step):
            self.reporter.line(f"{self.run}: {changes}")
        self.state = dataclasses.replace(loaded, config=self.state.config)
        assert self._folder.loaded is not None
        self.reporter.line(
            f"{_restart_prefix()}resuming from {self._folder.loaded.location} "
            f"(step {loaded.step} of {len(self.batches)})"
        )
        if loaded.scaler is not None:
            parts.scaler.load_state_dict(loaded.scaler)

    def _check_profile(self) -> None:
        left = len(self.batches) - self.state.step
        if left < (required := WARM_UP + STEPS):
            raise InputError(f"--profile: expected a run of at least {required} more steps, found {left}")

    def _open_log(self) -> RunLog:
        if not self.ranks.is_first:
            return NoLog()
        state = self.state
        return RunLog(
            self.run,
            step=state.step,
            dev_step=state.dev_step,
            trackers=self.config.trackers,
            settings=run_settings(self.config),
            plot=self.config.plot,
        )


def _restart_prefix() -> str:
    """Return the beginning of the first message if torchrun has restarted the processes."""
    return f"restarted by torchrun (attempt {restart_count()}): " if restart_count() else ""
