"""Plots of the index benchmarks."""

from __future__ import annotations

from pathlib import Path

from scripts.benchmarks.result_rows import read_rows


def draw(results: Path) -> None:
    """Draw index_sizes.png: memory and time of every measured index at the recall target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    rows = [row for row in read_rows(results / "index_sizes.csv") if row["kind"] == "measured"]
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
        xscale="log",
        yscale="log",
        xlabel="bytes per vector",
        ylabel="µs of one core per query",
        title="at recall@10 0.95",
    )
    right.set(xscale="log", yscale="log", xlabel="vectors", ylabel="seconds to build", title="building")
    left.xaxis.set_minor_formatter(NullFormatter())
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(results / "index_sizes.png", dpi=110, metadata={"Software": None})
