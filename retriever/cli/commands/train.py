"""`retriever train`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from index.progress import Reporter
from retriever.cli.commands.common import Switch, check_counts
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import CONFIG_FILE, load_config, with_absolute_paths
from retriever.errors import ConfigError
from retriever.utils.interrupt import Interrupted
from retriever.utils.torchrun import attempt, check_environment, process_count, rank

if TYPE_CHECKING:
    from retriever.distributed.ranks import Ranks


@dataclass(frozen=True)
class Train:
    """Train towers on pairs: `retriever train run.yaml [--any.field value]`, or `retriever train --resume RUN`."""

    file: Annotated[Positional[str | None], arg(metavar="[RUN.YAML]")] = None
    """YAML file with the configuration; flags override it."""
    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    resume: str | None = None
    """Folder of a run to go on with, exactly where it stopped, with its own configuration."""
    profile: Switch = False
    """Show where the time of three early steps goes, and write a trace of them into the run's folder."""
    dry_run: Switch = False
    """Say what each process will need (data, towers, loss, optimizer), and train nothing."""
    processes: int | None = None
    """With --dry-run: plan for so many processes, without starting them; empty for those that torchrun has started."""

    def __post_init__(self) -> None:
        check_counts(self, "processes")
        if self.processes is not None and not self.dry_run:
            raise ValueError("--processes: goes with --dry-run; torchrun starts the processes of a run")
        if self.profile and self.dry_run:
            raise ValueError("--profile: expected without --dry-run, which trains no steps")

    def run(self, reporter: Reporter) -> int:
        from retriever.distributed.agreement import config_fields
        from retriever.distributed.context import SilentReporter, joined_ranks, uses_gpus

        if self.dry_run:
            return self._plan(reporter)
        gpus = uses_gpus(self.config.device)
        same = {"command": "train", "--resume": self.resume is not None, "--profile": self.profile}
        same |= {"device": "cuda" if gpus else "cpu", **config_fields(self.config)}
        with joined_ranks(same, on_devices=gpus) as ranks:
            return self._train(reporter if ranks.first else SilentReporter(), ranks)

    def _plan(self, reporter: Reporter) -> int:
        from retriever.distributed.ranks import PlannedRanks
        from retriever.training.new_run import NewRun
        from retriever.training.run_dir import cache_of, written_config
        from retriever.training.trainer import Trainer

        check_environment()
        if rank():
            # Under torchrun one of the processes says it for all.
            return 0

        config = with_absolute_paths(self.config if self.resume is None else written_config(Path(self.resume)))
        run = Path(config.out if self.resume is None else self.resume)
        with NewRun(run, cache_of(config, run), reporter).removed_on_failure():
            plan = Trainer(config, run, reporter, PlannedRanks(size=self.processes or process_count())).plan()
        print("\n".join(plan.lines()))
        if not plan.fits:
            reporter.line("this does not fit: fewer --micro-batch-tokens, a smaller --batch-size, or more processes")
        return 0 if plan.fits else 1

    def _train(self, reporter: Reporter, ranks: Ranks) -> int:
        from retriever.training.trainer import Trainer

        if self.resume is not None:
            if self.file is not None or self.config != TrainConfig():
                raise ConfigError("--resume: a run goes on with its own configuration; give no file and no other flag")
            trainer = Trainer.resume(Path(self.resume), reporter, ranks)
        elif ranks.told(ranks.first and is_restarted(self.config, ranks)):
            trainer = Trainer.resume(Path(self.config.out), reporter, ranks)
        else:
            trainer = Trainer.start(self.config, reporter, ranks, profile=self.profile)
        try:
            with trainer.removed_without_a_step():
                model = trainer.train(profile=self.profile)
        except Interrupted as signal:
            reporter.line(
                f"{signal} at step {trainer.state.step}: checkpoint saved; "
                f"go on with: retriever train --resume {trainer.run}"
            )
            return 1
        best = trainer.state.best_score
        kept = "" if best is None else f" (step {trainer.state.best_step}, dev {trainer.dev_metric} {best:.4f})"
        reporter.line(f"model: {model}{kept}")
        return 0


def is_restarted(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether torchrun has started this process again, after one of its job failed that had begun this very run."""
    written = Path(config.out) / CONFIG_FILE
    if not attempt() or not written.exists() or not ranks.have_begun(config.out):
        return False
    # The trainer wrote these two as it chose them.
    begun = load_config(written)
    asked = with_absolute_paths(config)
    tokens = asked.micro_batch_tokens or begun.micro_batch_tokens
    precision = begun.precision if asked.precision == "auto" else asked.precision
    return begun == replace(asked, precision=precision, micro_batch_tokens=tokens)
