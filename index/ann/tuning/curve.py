"""Plot of recall against time per query, as measured by tuning."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from index.ann.tuning.result import Tuning


def draw(tuning: Tuning, title: str, path: Path) -> None:
    """Write a PNG with every measured setting, the target, and the chosen setting.

    No-op if matplotlib (an optional dependency) is not installed; the manifest contains the figures anyway.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    times = [point.microseconds for point in tuning.curve]
    recalls = [point.recall for point in tuning.curve]
    below = [point.recall - point.at_least for point in tuning.curve]
    axes.errorbar(times, recalls, yerr=[below, [0.0] * len(below)], fmt="o", markersize=3, linewidth=0.8, color="C0")
    target, chosen = tuning.target.recall, tuning.chosen
    axes.axhline(target, color="C7", linestyle="--", linewidth=1, label=f"target {target:g}")
    label = str(chosen.settings)
    axes.plot(chosen.microseconds, chosen.recall, "o", markersize=9, fillstyle="none", color="C3", label=label)
    axes.set_xscale("log")
    # Ticks at 1, 2 and 5: few curves span two powers of ten.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"µs a query, {tuning.threads} threads, batch of {tuning.queries:,}")
    axes.set_ylabel(f"recall@{tuning.target.k}, with the lower end of its 95 % interval")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})
