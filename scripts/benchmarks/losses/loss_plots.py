"""Plots of the loss benchmark: memory and time by batch size, as in the paper of Inf-CL."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from scripts.benchmarks.result_rows import read_rows

OURS = "ours"
# Lines that would crowd the plots. The table has them.
LEFT_OUT = ("ours, chunked fp32", "ours, full fp32", "ours, sigmoid chunked bf16")
LEAST_GAP = 0.036


def draw(results: Path) -> None:
    """Draw loss_memory.png and loss_time.png beside loss.csv. A column without values gets no plot."""
    rows = [row for row in read_rows(results / "loss.csv") if row["part"] == "sizes"]
    about = rows[0]["hardware"] + f", {rows[0]['dim']} dimensions" if rows else ""
    plot(rows, "extra_mib", "MiB beyond the embeddings", f"memory of the loss, {about}", results / "loss_memory.png")
    plot(rows, "milliseconds", "ms, forward and backward", f"time of the loss, {about}", results / "loss_time.png")


def plot(rows: list[dict[str, str]], column: str, unit: str, title: str, path: Path) -> None:
    """Draw a labeled line for each method. Ours are thick, sigmoid losses dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row[column] and row["method"] not in LEFT_OUT:
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
        color = f"C{number % 10}"
        style = "--" if kinds[name] == "sigmoid" else "-"
        axes.plot(
            *zip(*points, strict=True), style, color=color, lw=2.4 if own else 1, marker="os^vDP*"[number % 7], ms=5
        )
        ends[name] = (points[-1], color, own)
    label_ends(axes, ends)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def label_ends(axes: Any, ends: dict[str, tuple[tuple[float, float], str, bool]]) -> None:
    """Put the names right of the axes, close to the ends of their lines but apart from each other."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights = apart([(math.log(end[1]) - low) / (high - low) for end, _, _ in ends.values()])
    for (name, (end, color, own)), height in zip(ends.items(), heights, strict=True):
        weight = "bold" if own else "normal"
        axes.text(1.1, height, name, transform=axes.transAxes, fontsize=8, fontweight=weight, color=color, va="center")
        axes.annotate(
            "",
            end,
            xytext=(1.09, height),
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3},
        )


def apart(wanted: list[float]) -> list[float]:
    """Heights in the axes, close to the wanted ones and in their order, at least LEAST_GAP apart and at most 1."""
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
    """Abbreviate a size, for example 65536 to 64k."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if size >= unit and size % unit == 0:
            return f"{size / unit:g}{name}"
    return f"{size:g}"
