"""`retriever study`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from index.progress import Reporter
from retriever.cli.commands.common import Switch
from retriever.utils.interrupt import Interrupted


@dataclass(frozen=True)
class Study:
    """Train a run for each batch size, learning rate and seed, and report quality, time and memory. The same command
    continues a study that was stopped."""

    file: Annotated[Positional[str], arg(metavar="RUN.YAML")]
    """YAML file with the configuration of the runs, with a dev set."""
    out: str
    """Folder of the study: study.csv, study.md, study.png, and the runs in cells/."""
    batch_size: tuple[int, ...] = ()
    """Batch sizes. Empty: that of the configuration."""
    lr: tuple[float, ...] = ()
    """Learning rates at the batch size of the configuration. Empty: that of the configuration."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds."""
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    """How learning rates are scaled if the batch size is not that of the configuration. sqrt: by the square root of the
    ratio of the batch sizes. linear: by the ratio. none: not scaled."""
    dry_run: Switch = False
    """Print the runs, their steps and an estimate of their time, for which a few steps are timed. Train no run."""

    def run(self, reporter: Reporter) -> int:
        from retriever.selection.study import study

        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        try:
            found = study(arguments.pop("file"), **arguments, progress=reporter)
        except Interrupted as interrupted:
            reporter.line(f"{interrupted}: the same command continues the study in {self.out}")
            return 1
        if self.dry_run:
            print("\n".join(found.plan))
        else:
            print((found.folder / "study.md").read_text(encoding="utf-8"), end="")
        return 0
