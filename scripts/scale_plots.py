"""What scripts/bench_scale.py shows: memory and time of the losses against the batch, and what more GPUs bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loss_plots import plot
from ring_plots import new_figure

Rows = list[dict[str, str]]


def draw(rows: Rows, results: Path) -> None:
    """scale_memory.png and scale_speed.png, of the parts that were measured."""
    losses = [{**row, "size": row["pairs"], "kind": "softmax"} for row in rows if row["part"] == "loss"]
    if losses:
        about = f"{losses[0]['ranks']} × {losses[0]['hardware']}, {losses[0]['dim']} dimensions"
        title = f"memory of the loss on each, embeddings and gradients included, {about}"
        plot(losses, "peak_mib", "MiB at the peak", title, results / "scale_memory.png")
    scaling = [row for row in rows if row["part"] == "scaling" and row["milliseconds"]]
    steps = [row for row in rows if row["part"] == "step" and row["milliseconds"]]
    if scaling or steps:
        draw_speed(scaling, steps, results / "scale_speed.png")


def draw_speed(scaling: Rows, steps: Rows, path: Path) -> None:
    """The loss by more ranks beside what is perfect, and milliseconds a pair of whole steps."""
    figure, axes = new_figure(11, 3.8, columns=2)
    speed, step = axes
    for number, size in enumerate(dict.fromkeys(row["pairs"] for row in scaling)):
        some = [row for row in scaling if row["pairs"] == size]
        ranks = [int(row["ranks"]) for row in some]
        times = [float(row["milliseconds"]) for row in some]
        speed.plot(ranks, times, "o-", color=f"C{number}", label=f"{int(size):,} pairs")
        speed.plot(ranks, [times[0] * ranks[0] / count for count in ranks], ":", color=f"C{number}")
        speed.set_xticks(ranks, [str(count) for count in ranks])
    speed.set(xlabel="GPUs (dotted: perfect)", ylabel="ms of the loss, forward and backward", yscale="log")
    for number, (towers, method) in enumerate(dict.fromkeys((row["towers"], row["method"]) for row in steps)):
        some = [row for row in steps if (row["towers"], row["method"]) == (towers, method)]
        points = sorted((int(row["pairs"]), float(row["milliseconds"]) / int(row["pairs"])) for row in some)
        style = {"lw": 2.4} if method.startswith("ours") else {"lw": 1}
        step.plot(*zip(*points, strict=True), "o-", ms=4, color=f"C{number % 10}", label=f"{towers}, {method}", **style)
    step.set(xlabel="pairs in the batch", ylabel="ms a pair of a whole step", xscale="log", yscale="log")
    for some in axes:
        some.grid(alpha=0.25)
        if some.get_legend_handles_labels()[0]:
            some.legend(fontsize=7)
    about: Any = (scaling or steps)[0]
    figure.suptitle(f"{max(int(row['ranks']) for row in scaling + steps)} × {about['hardware']}", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")
