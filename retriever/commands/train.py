"""`retriever train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from retriever.config import ConfigError, TrainConfig
from retriever.interrupt import Interrupted
from retriever.progress import Terminal


@dataclass(frozen=True)
class Train:
    """Train towers on pairs: `retriever train run.yaml [--any.field value]`, or `retriever train --resume RUN`."""

    file: Annotated[Positional[str | None], arg(metavar="[RUN.YAML]")] = None
    """YAML file with the configuration; flags override it."""
    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    resume: str | None = None
    """Folder of a run to go on with, exactly where it stopped, with its own configuration."""

    def run(self, terminal: Terminal) -> int:
        from retriever.trainer import Trainer

        if self.resume is not None:
            if self.file is not None or self.config != TrainConfig():
                raise ConfigError("--resume: a run goes on with its own configuration; give no file and no other flag")
            trainer = Trainer.resume(Path(self.resume), terminal)
        else:
            trainer = Trainer.start(self.config, terminal)
        try:
            model = trainer.train()
        except Interrupted as signal:
            terminal.line(
                f"{signal} at step {trainer.state.step}: checkpoint saved; "
                f"go on with: retriever train --resume {trainer.run}"
            )
            return 1
        best = trainer.state.best_score
        kept = "" if best is None else f" (step {trainer.state.best_step}, dev {trainer.dev_metric} {best:.4f})"
        terminal.line(f"model: {model}{kept}")
        return 0
