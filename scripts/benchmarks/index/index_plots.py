"""Plots of what scripts/benchmarks/index/bench_index.py measured."""

from __future__ import annotations

import csv
from pathlib import Path


def draw(results: Path) -> None:
    """Write index_sizes.png: memory and time of every measured size at the recall target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    with (results / "index_sizes.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["kind"] == "measured"]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(row["set"] for row in rows)):
        some = [row for row in rows if row["set"] == name]
        met = [row for row in some if row["met"] == "True"]
        color = f"C{number}"
        for axes, points, x, y in (
            (left, met, "bytes_per_vector", "core_us_per_query"),
            (right, some, "rows", "build_s"),
        ):
            places = [(float(row[x]), float(row[y])) for row in points]
            axes.scatter(*zip(*places, strict=True), color=color, label=name)
            for row, place in zip(points, places, strict=True):
                axes.annotate(row["factory"], place, fontsize=6, xytext=(3, 3), textcoords="offset points")
    left.set(
        xscale="log", yscale="log", xlabel="bytes a vector", ylabel="µs of one core a query", title="at recall@10 0.95"
    )
    right.set(xscale="log", yscale="log", xlabel="vectors", ylabel="seconds to build", title="building")
    left.xaxis.set_minor_formatter(NullFormatter())
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(results / "index_sizes.png", dpi=110, metadata={"Software": None})
