"""Plots of what scripts/bench_loss.py measured: memory and time against the batch, as in the paper of Inf-CL."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from typing import Any

OURS = "ours, "
LEAST_GAP = 0.036


def draw(results: Path) -> None:
    """Write loss_memory.png and loss_time.png beside loss.csv; without a column's figures, not its plot."""
    with (results / "loss.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["part"] == "sizes"]
    about = rows[0]["hardware"] + f", {rows[0]['dim']} dimensions" if rows else ""
    plot(rows, "extra_mib", "MiB beside the embeddings", f"memory of the loss, {about}", results / "loss_memory.png")
    plot(rows, "milliseconds", "ms, forward and backward", f"time of the loss, {about}", results / "loss_time.png")


def plot(rows: list[dict[str, str]], column: str, unit: str, title: str, path: Path) -> None:
    """A line for each method, named at its end; ours are thick, sigmoid losses dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row[column]:
            lines.setdefault(row["method"], []).append((float(row["size"]), float(row[column])))
    lines = {name: sorted(points) for name, points in lines.items()}
    if not lines:
        return
    kinds = {row["method"]: row["kind"] for row in rows}
    figure = Figure(figsize=(10, 6.4))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.09, 0.56, 0.84))
    axes.set(xscale="log", yscale="log", xlabel="pairs in the batch", ylabel=unit)
    axes.set_title(title, fontsize=10)
    sizes = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xticks(sizes, [short(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    ends = {}
    for number, (name, points) in enumerate(lines.items()):
        own = name.startswith(OURS)
        color = f"C{number % 10}" if own else ("0.25", "0.45", "0.6")[number % 3]
        style = "--" if kinds[name] == "sigmoid" else "-"
        marker = "o" if own else "^svDPX*"[number % 7]
        axes.plot(*zip(*points, strict=True), style, color=color, lw=2.2 if own else 1, marker=marker, ms=4)
        ends[name] = (points[-1], color, own)
    label_ends(axes, ends)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def label_ends(axes: Any, ends: dict[str, tuple[tuple[float, float], str, bool]]) -> None:
    """Names right of the axes, at the height of their lines' ends or as near as leaves them apart."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights = apart([(math.log(end[1]) - low) / (high - low) for end, _, _ in ends.values()])
    for (name, (end, color, own)), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            name,
            end,
            xytext=(1.04, height),
            textcoords="axes fraction",
            fontsize=8,
            fontweight="bold" if own else "normal",
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.6, "shrinkB": 3},
        )


def apart(wanted: list[float]) -> list[float]:
    """Heights in the axes, near those wanted and in their order, LEAST_GAP apart at least and at most 1."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    heights = list(wanted)
    for below, above in itertools.pairwise(order):
        heights[above] = max(heights[above], heights[below] + LEAST_GAP)
    ceiling = 1.0
    for place in reversed(order):
        heights[place] = min(heights[place], ceiling)
        ceiling = heights[place] - LEAST_GAP
    return heights


def short(size: float) -> str:
    """65536 -> "64k"."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if size >= unit and size % unit == 0:
            return f"{size / unit:g}{name}"
    return f"{size:g}"
