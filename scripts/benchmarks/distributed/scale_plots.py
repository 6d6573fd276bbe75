"""Plots of the scale benchmark: memory and time of the losses by batch size, and the speed-up with more GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.benchmarks.distributed.ring_plots import new_figure
from scripts.benchmarks.losses.loss_plots import plot, short

Rows = list[dict[str, str]]


def draw(rows: Rows, results: Path) -> None:
    """Draw scale_memory.png and scale_speed.png, of the parts that were measured."""
    losses = [{**row, "size": row["pairs"], "kind": "softmax"} for row in rows if row["part"] == "loss"]
    if losses:
        about = f"{losses[0]['ranks']} × {losses[0]['hardware']}, {losses[0]['dim']} dimensions"
        title = f"memory of the loss on each of {about}"
        plot(losses, "peak_mib", "MiB at the peak", title, results / "scale_memory.png")
    scaling = [row for row in rows if row["part"] == "scaling" and row["milliseconds"]]
    steps = [row for row in rows if row["part"] == "step" and row["milliseconds"]]
    if scaling or steps:
        draw_speed(scaling, steps, results / "scale_speed.png")


def draw_speed(scaling: Rows, steps: Rows, path: Path) -> None:
    """Draw the loss by number of ranks, and microseconds per pair of whole steps for each pair of towers."""
    parts = [(scaling, fill_scaling)] if scaling else []
    parts += [([row for row in steps if row["towers"] == towers], fill_steps) for towers in unique(steps, "towers")]
    figure, axes = new_figure(5 * len(parts), 3.8, columns=len(parts))
    for (rows, fill), some in zip(parts, axes if len(parts) > 1 else [axes], strict=True):
        fill(some, rows)
        some.grid(alpha=0.25)
        some.legend(fontsize=7, loc="lower left")
    hardware = (scaling or steps)[0]["hardware"]
    figure.suptitle(f"{max(int(row['ranks']) for row in scaling + steps)} × {hardware}", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")


def unique(rows: Rows, column: str) -> list[str]:
    """Distinct values of a column, in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in rows))


def fill_scaling(axes: Any, rows: Rows) -> None:
    """A line for each batch size, and a dotted line for perfect scaling."""
    for number, size in enumerate(unique(rows, "pairs")):
        some = [row for row in rows if row["pairs"] == size]
        ranks = [int(row["ranks"]) for row in some]
        times = [float(row["milliseconds"]) for row in some]
        axes.plot(ranks, times, "o-", color=f"C{number}", label=f"{int(size):,} pairs")
        axes.plot(ranks, [times[0] * ranks[0] / count for count in ranks], ":", color=f"C{number}")
        axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.set(xlabel="GPUs (dotted: perfect)", ylabel="ms of the loss, forward and backward", yscale="log")


def fill_steps(axes: Any, rows: Rows) -> None:
    """A line for each method."""
    for number, method in enumerate(unique(rows, "method")):
        some = [row for row in rows if row["method"] == method]
        points = sorted((int(row["pairs"]), 1000 * float(row["milliseconds"]) / int(row["pairs"])) for row in some)
        style = {"lw": 2.4} if method.startswith("ours") else {"lw": 1}
        axes.plot(*zip(*points, strict=True), "o-", ms=4, color=f"C{number}", label=method, **style)
    ylabel = "µs per pair of a whole step"
    axes.set(title=rows[0]["towers"], xlabel="pairs in the batch", ylabel=ylabel, xscale="log", ylim=(0, None))
    axes.title.set_size(10)
    sizes = sorted({int(row["pairs"]) for row in rows if int(row["pairs"]).bit_count() == 1})
    axes.set_xticks(sizes, [short(size) for size in sizes])
    axes.minorticks_off()
