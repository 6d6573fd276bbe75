"""The report of a study: CSV, Markdown and a plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from eval.reports.markdown import table
from index.files import atomic_path
from index.progress import Reporter
from retriever.selection.cells import Cell

Result = dict[str, Any]
"""Fields of a cell's result.json: score, best_step, steps, seconds, memory_mib; of a failed cell: error."""


@dataclass(frozen=True)
class Row:
    """The cells of one batch size and learning rate.

    Attributes:
        batch_size: Batch size.
        lr: Learning rate before it was scaled.
        scaled_lr: Learning rate of the runs.
        steps: Number of steps of a run.
        seeds: Number of runs that have finished.
        score: Mean of the best dev score of the runs; None if no run has finished.
        interval: Half of the 95 % confidence interval of the mean over seeds (Student's t); None with one seed.
        seconds: Mean seconds of training, without evaluations.
        memory_mib: Largest memory in MiB.
        errors: Why runs have failed.
    """

    batch_size: int
    lr: float
    scaled_lr: float
    steps: int | None
    seeds: int
    score: float | None
    interval: float | None
    seconds: float | None
    memory_mib: float | None
    errors: tuple[str, ...]


def rows_of(results: Sequence[tuple[Cell, Result]]) -> list[Row]:
    """Summarize the results by batch size and learning rate, in this order."""
    keys = sorted({(cell.batch_size, cell.lr) for cell, _ in results})
    return [_row([(c, r) for c, r in results if (c.batch_size, c.lr) == key]) for key in keys]


def _row(group: Sequence[tuple[Cell, Result]]) -> Row:
    cell = group[0][0]
    done = [result for _, result in group if "error" not in result]
    scores = [result["score"] for result in done]
    return Row(
        cell.batch_size,
        cell.lr,
        cell.lr * cell.factor,
        done[0]["steps"] if done else None,
        len(done),
        float(np.mean(scores)) if scores else None,
        mean_interval(scores),
        float(np.mean([result["seconds"] for result in done])) if done else None,
        max((result["memory_mib"] for result in done), default=None),
        tuple(f"seed {c.seed}: {result['error']}" for c, result in group if "error" in result),
    )


def mean_interval(scores: Sequence[float]) -> float | None:
    """Return half of the 95 % confidence interval of the mean (Student's t), or None for fewer than two scores."""
    if len(scores) < 2:
        return None
    deviation = float(np.std(scores, ddof=1))
    return float(stats.t.ppf(0.975, len(scores) - 1)) * deviation / math.sqrt(len(scores))


def write_report(
    folder: Path, metric: str, rule: str, results: Sequence[tuple[Cell, Result]], reporter: Reporter, *, plot: bool
) -> list[Row]:
    """Write cells.csv, study.csv, study.md and, with `plot` and if matplotlib is installed, study.png."""
    rows = rows_of(results)
    cells = [
        {
            "batch_size": cell.batch_size,
            "lr": cell.lr,
            "scaled_lr": cell.lr * cell.factor,
            "seed": cell.seed,
            **{name: result.get(name) for name in ("steps", "score", "best_step", "seconds", "memory_mib", "error")},
        }
        for cell, result in results
    ]
    _write_csv(folder / "cells.csv", cells)
    _write_csv(folder / "study.csv", [{**vars(row), "errors": "; ".join(row.errors)} for row in rows])
    plotted = plot and _plot(folder / "study.png", metric, rows, reporter)
    head = ["batch size", "learning rate", "steps", "seeds", f"dev {metric}", "minutes", "MiB"]
    lines = [
        "# Study",
        "",
        f"The best dev {metric} of each run: mean over seeds ± half of its 95 % interval. {rule} Minutes of training "
        f"do not include evaluations.",
        "",
        table(head, [_cells(row) for row in rows]),
        *([f"\n![{metric}, time and memory by batch size](study.png)"] if plotted else []),
    ]
    with atomic_path(folder / "study.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def _cells(row: Row) -> list[str]:
    interval = "" if row.interval is None else f" ± {row.interval:.4f}"
    score = "; ".join(row.errors) if row.score is None else f"{row.score:.4f}{interval}"
    return [
        f"{row.batch_size:,}",
        f"{row.scaled_lr:.2g}",
        "" if row.steps is None else f"{row.steps:,}",
        str(row.seeds),
        score,
        "" if row.seconds is None else f"{row.seconds / 60:.1f}",
        "" if row.memory_mib is None else f"{row.memory_mib:,.0f}",
    ]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _plot(path: Path, metric: str, rows: Sequence[Row], reporter: Reporter) -> bool:
    """Draw score, minutes and memory by batch size, a line for each learning rate."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        reporter.line('study.png needs matplotlib: pip install "dense-retriever[plot]"')
        return False
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for rate in sorted({row.lr for row in rows}):
        line = [row for row in rows if row.lr == rate and row.score is not None]
        sizes = [row.batch_size for row in line]
        bars = [row.interval or 0.0 for row in line]
        label = f"lr {rate:g}"
        panels[0].errorbar(sizes, [row.score for row in line], yerr=bars, marker="o", capsize=3, label=label)
        panels[1].plot(sizes, [(row.seconds or 0.0) / 60 for row in line], marker="o", label=label)
        panels[2].plot(sizes, [(row.memory_mib or 0.0) / 1024 for row in line], marker="o", label=label)
    for panel, title in zip(panels, (f"dev {metric}", "training, minutes", "memory, GiB"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("batch size")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    for panel in panels[1:]:
        panel.set_ylim(bottom=0)
    panels[0].legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return True
