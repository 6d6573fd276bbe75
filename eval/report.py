"""Reports for people and programs: report.json, report.md and a bar plot, from named metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.metrics import Metrics
from index.files import InputError, atomic_path, write_json

HEADLINE = ("ndcg@10", "recall@100", "mrr@10", "map@100", "precision@10")
PLOTTED = ("ndcg@10", "recall@100")
NAMES = {"ndcg": "nDCG", "map": "MAP", "recall": "recall", "precision": "precision", "mrr": "MRR"}

log = logging.getLogger(__name__)


def measure_name(measure: str) -> str:
    """How a measure is printed: "ndcg@10" -> "nDCG@10"."""
    name, _, k = measure.partition("@")
    return f"{NAMES.get(name, name)}@{k}"


def comparison_table(rows: Mapping[str, Metrics], measures: Sequence[str] = HEADLINE, head: str = "model") -> str:
    """A Markdown table, a line per row, values with four digits; measures that no row has are left out.

    Args:
        rows: name -> metrics, in the order wanted ("BM25", "before training", "after training").
        measures: the columns.
        head: what a row is ("model", "dataset").
    """
    columns = [measure for measure in measures if any(measure in metrics.mean for metrics in rows.values())]
    lines = [
        f"| {head} | " + " | ".join(measure_name(measure) for measure in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, metrics in rows.items():
        cells = [f"{metrics.mean[measure]:.4f}" if measure in metrics.mean else "–" for measure in columns]
        lines.append(f"| {name.replace('|', '/')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_report(
    folder: Path,
    rows: Mapping[str, Metrics],
    *,
    title: str,
    details: Mapping[str, Any] | None = None,
    head: str = "model",
) -> list[Path]:
    """Write report.json, report.md and, where matplotlib is installed, report.png; each is whole or absent.

    Args:
        folder: made if it is not there.
        rows: name -> metrics; not empty.
        title: what was evaluated, for example "wordnet, test split".
        details: what is needed to do it again (model, data, versions): kept in the JSON and listed in the Markdown.
        head: what a row is ("model", "dataset").

    Returns:
        The files written.

    Raises:
        InputError: there are no rows.
    """
    if not rows:
        raise InputError(f"{folder}: expected at least one result to report, found none")
    details = dict(details or {})
    paths = [folder / "report.json", folder / "report.md"]
    plotted = plot(folder / "report.png", rows, title)
    write_json(paths[0], {"title": title, "details": details, "rows": {n: _as_json(m) for n, m in rows.items()}})
    with atomic_path(paths[1]) as temporary:
        temporary.write_text(_markdown(rows, title, details, head, plotted), encoding="utf-8")
    return [*paths, folder / "report.png"] if plotted else paths


def _as_json(metrics: Metrics) -> dict[str, Any]:
    return {"queries": len(metrics.per_query), "missing_queries": metrics.missing, "mean": metrics.mean}


def _markdown(rows: Mapping[str, Metrics], title: str, details: Mapping[str, Any], head: str, plotted: bool) -> str:
    parts = [f"# {title}\n", comparison_table(rows, head=head)]
    for name, metrics in rows.items():
        if metrics.missing:
            named = ", ".join(metrics.missing[:3]) + (", …" if len(metrics.missing) > 3 else "")
            total = len(metrics.per_query)
            parts.append(
                f"{name}: {len(metrics.missing):,} of {total:,} queries got no passage and count as 0: {named}\n"
            )
    if plotted:
        parts.append("![nDCG@10 and recall@100](report.png)\n")
    parts.append("## Every cut-off\n")
    for name, metrics in rows.items():
        parts += [f"### {name}\n", _cutoff_table(metrics)]
    if details:
        parts += ["## How\n", "".join(f"- {key}: {value}\n" for key, value in details.items())]
    return "\n".join(parts)


def _cutoff_table(metrics: Metrics) -> str:
    """Measures down, cut-offs across."""
    names = list(dict.fromkeys(measure.partition("@")[0] for measure in metrics.mean))
    ks = list(dict.fromkeys(measure.partition("@")[2] for measure in metrics.mean))
    lines = ["| at k = | " + " | ".join(ks) + " |", "|---|" + "---:|" * len(ks)]
    for name in names:
        cells = " | ".join(f"{metrics.mean[f'{name}@{k}']:.4f}" for k in ks)
        lines.append(f"| {NAMES.get(name, name)} | {cells} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: Mapping[str, Metrics], title: str) -> bool:
    """Draw nDCG@10 and recall@100 as bars, a panel each, to a PNG file; False (and a log line) without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.warning('no plot: it needs matplotlib: pip install "dense-retriever[plot]"')
        return False
    measures = [measure for measure in PLOTTED if all(measure in metrics.mean for metrics in rows.values())]
    if not measures:
        log.warning("no plot: the cut-offs include neither nDCG@10 nor recall@100")
        return False
    names = list(rows)
    figure = Figure(figsize=(4.2 * len(measures) + 1.2, 1.3 + 0.42 * len(names)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure, colour in zip(panels, measures, ("#2f6690", "#81a4cd"), strict=False):
        bars = axes.barh(names, [metrics.mean[measure] for metrics in rows.values()], height=0.62, color=colour)
        axes.bar_label(bars, fmt="%.3f", padding=4, fontsize=9, color="#333333")
        axes.set_title(measure_name(measure), loc="left", fontsize=10, color="#333333")
        axes.set_xlim(0, 1.12 * max(0.05, *(metrics.mean[measure] for metrics in rows.values())))
        axes.tick_params(length=0, labelsize=9, colors="#333333")
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color("#bbbbbb")
    panels[0].invert_yaxis()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color="#222222")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return True
