"""The plot of a run, from the rows of metrics.jsonl to a PNG file."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE = "metrics.png"
"""Name of the plot in a run folder."""
# Fewer rows are better read than plotted.
MIN_ROWS = 3
COLUMNS = 3
# The color-blind safe palette of Okabe and Ito.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#a0529a", "#b07d00", "#3a8fc4")
STYLE: Any = {
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "legend.frameon": False,
}

log = logging.getLogger("retriever")


@dataclass(frozen=True)
class Panel:
    """One part of the plot: the rows' values under some keys, by step."""

    title: str
    keys: tuple[str, ...]
    """Keys of metrics.jsonl; * stands for any characters. A panel without values is left out."""
    log_scale: bool = False
    """Whether the vertical axis is logarithmic. Default: False."""


# To show another measure, add its key to a panel, or add a panel.
PANELS = (
    Panel("Loss", ("loss", "loss_*", "loss/*")),
    Panel("Dev set", ("dev_ndcg@10", "dev_mrr@10", "dev_recall@1", "dev_recall@100", "dev_acc1", "dev_mean_average_*")),
    Panel("Batch as a retrieval task", ("pool_accuracy*", "pool_mrr*")),
    Panel("Rank of the positive", ("pool_rank*",), log_scale=True),
    Panel("Cosine of the hardest negative", ("pool_hardest*",)),
    Panel("Entropy of the scores of a query, nats", ("pool_entropy*",)),
    Panel("Share of masked pairs", ("pool_masked*",)),
    Panel("Learning rate", ("lr",)),
    Panel("Gradient norm", ("grad_norm",), log_scale=True),
    Panel("Logit scale", ("logit_scale*",)),
    Panel("Pairs per second", ("pairs_per_second",)),
)


def plot_run(rows: Sequence[Mapping[str, Any]], path: Path, panels: Sequence[Panel] = PANELS) -> bool:
    """Draw the rows of a run. A value `x` with `x_low` and `x_high` in its row gets a band.

    Args:
        rows: Rows of metrics.jsonl, each with a "step".
        path: PNG file to write.
        panels: The panels. Default: PANELS.

    Returns:
        Whether the file was written: not if there are fewer than MIN_ROWS rows, or matplotlib is not installed.
    """
    shown = [(panel, series) for panel in panels if (series := _series(rows, panel.keys))]
    if len(rows) < MIN_ROWS or not shown:
        return False
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info('no plot of the run: it needs matplotlib: pip install "dense-retriever[plot]"')
        return False
    lines = -(-len(shown) // COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * min(COLUMNS, len(shown)), 2.6 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, min(COLUMNS, len(shown)), squeeze=False).ravel()
        for ax, (panel, series) in zip(axes, shown, strict=False):
            _draw(ax, panel, series)
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return True


def _series(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """Return key -> rows with a number under it, in the order of the keys."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    bounds = {f"{name}{end}" for name in names for end in ("_low", "_high")}
    found = [name for key in keys for name in names if fnmatch.fnmatchcase(name, key) and name not in bounds]
    series = {name: [row for row in rows if isinstance(row.get(name), int | float)] for name in dict.fromkeys(found)}
    return {name: points for name, points in series.items() if points}


def _draw(ax: Axes, panel: Panel, series: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for number, (name, points) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        marker = "o" if len(points) <= 30 else ""
        label = name.removeprefix("dev_").removeprefix("pool_")
        steps, values = [row["step"] for row in points], [row[name] for row in points]
        ax.plot(steps, values, color=color, label=label, marker=marker, markersize=3)
        low, high = f"{name}_low", f"{name}_high"
        banded = [row for row in points if low in row and high in row]
        if banded:
            steps = [row["step"] for row in banded]
            bounds = [row[low] for row in banded], [row[high] for row in banded]
            ax.fill_between(steps, *bounds, color=color, alpha=0.15)
    ax.set_title(panel.title)
    ax.set_xlabel("step")
    if panel.log_scale:
        ax.set_yscale("log")
        # The usual labels, powers of ten, are formulas, which are not parsed here.
        ax.yaxis.set_major_formatter("{x:g}")
        bottom, top = ax.get_ylim()
        # Over several decades the labels between powers of ten would overlap.
        ax.yaxis.set_minor_formatter("{x:g}" if bottom > 0 and top / bottom < 10 else "")
    if len(series) > 1:
        ax.legend()
