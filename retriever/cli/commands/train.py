"""`retriever train`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from index.progress import Reporter
from retriever.cli.commands.common import Switch
from retriever.config.run import TrainConfig
from retriever.errors import ConfigError, check_at_least
from retriever.utils.interrupt import Interrupted
from retriever.utils.torchrun import check_environment, rank, world_size


@dataclass(frozen=True)
class Train:
    """Train a model: `retriever train run.yaml [--any.field value]`, or `retriever train --resume RUN`."""

    file: Annotated[Positional[str | None], arg(metavar="[RUN.YAML]")] = None
    """YAML file with the configuration; flags override it."""
    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    resume: str | None = None
    """Folder of a run to continue from its last checkpoint, with its own configuration."""
    profile: Switch = False
    """Report where the time of three early steps goes, and write a trace of them to the run's folder."""
    dry_run: Switch = False
    """Report the memory that each process will need (data, towers, loss, optimizer) without training."""
    processes: int | None = None
    """Number of processes to plan for with --dry-run, without starting them. None: those that torchrun started."""

    def __post_init__(self) -> None:
        if self.processes is not None and not self.dry_run:
            raise ValueError("--processes: expected together with --dry-run; torchrun starts the processes of a run")
        if self.profile and self.dry_run:
            raise ValueError("--profile: expected without --dry-run, which trains no steps")

    def run(self, reporter: Reporter) -> int:
        if self.processes is not None:
            check_at_least(1, processes=self.processes)
        if self.dry_run:
            return self._plan(reporter)
        config = None if self.resume is not None and self.config == TrainConfig() else self.config
        if self.resume is not None and (self.file is not None or config is not None):
            raise ConfigError("--resume: a run continues with its own configuration; give no file and no other flag")
        try:
            with self._converting_sources():
                from retriever.training.train import train

                run = train(config, resume=self.resume, profile=self.profile, progress=reporter)
        except Interrupted as interrupted:
            if rank() == 0:
                reporter.line(
                    f"{interrupted} at step {interrupted.step}: checkpoint saved; "
                    f"continue with: retriever train --resume {interrupted.run}"
                )
            return 1
        if rank() == 0:
            kept = ""
            if run.best_score is not None:
                kept = f" (step {run.best_step}, dev {run.dev_metric} {run.best_score:.4f})"
            reporter.line(f"model: {run.model_folder}{kept}")
        return 0

    def _converting_sources(self) -> contextlib.AbstractContextManager[None]:
        """Convert the sources of a new run of one process while the libraries are imported."""
        from retriever.data.early_conversion import converting
        from retriever.data.table import open_source

        new = self.resume is None and world_size() == 1
        return converting(self.config.data.sources if new else (), open_source)

    def _plan(self, reporter: Reporter) -> int:
        check_environment()
        if rank():
            # Under torchrun the first process reports for all.
            return 0
        from retriever.training.train import plan_run

        plan = plan_run(self.config, resume=self.resume, processes=self.processes or world_size(), progress=reporter)
        print("\n".join(plan.lines()))
        if not plan.fits:
            reporter.line("this does not fit: lower --micro-batch-tokens or --batch-size, or use more processes")
        return 0 if plan.fits else 1
