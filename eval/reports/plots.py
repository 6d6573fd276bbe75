"""Plots of a report with matplotlib: PNG files for Markdown, and SVG with CSS colors for HTML."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.compare import Pair, values_of
from eval.measures import measure_name
from eval.metrics import Metrics, Qrels
from eval.ranking import RankedRun
from eval.reports.escaping import printable
from index.files import atomic_path

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colors on a white background. In SVG each one becomes a CSS variable, so that the page can have a dark mode; the
# hexadecimal values are the keys and must be distinct. SERIES follows the color-blind safe palette of Okabe and Ito.
INK, MUTED, LINE = "#222223", "#5f6670", "#c4c9d0"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#a0529a", "#b07d00", "#3a8fc4")
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", **{color: f"s{i}" for i, color in enumerate(SERIES)}}
MARKERS = "os^Dvp"
WIDTH, HEIGHT = 4.4, 3.3
# Scatter plots with more points are rasterized within the SVG.
VECTOR_POINTS = 1500


def available() -> bool:
    """Whether matplotlib is installed; if not, log a warning with the package to install."""
    try:
        import matplotlib.figure
    except ImportError:
        log.warning('no plots: they need matplotlib: pip install "dense-retriever[plot]"')
        return False
    return bool(matplotlib.figure)


@contextmanager
def style() -> Iterator[None]:
    """A context with the matplotlib settings of the reports; text from data is never parsed as math."""
    import matplotlib

    settings: Any = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Glyphs missing from matplotlib's font are rendered by the browser's font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def bars(sets: Mapping[str, Mapping[str, Metrics]], measures: Sequence[str]) -> Figure:
    """Bars of the systems grouped by set and labeled with their values; one panel per measure."""
    systems = list(dict.fromkeys(system for rows in sets.values() for system in rows))
    count = sum(len(rows) for rows in sets.values()) + 0.6 * len(sets)
    grouped = len(systems) > 1 < len(sets)
    height = 0.75 + 0.27 * count + (0.2 * len(systems) if grouped else 0)
    figure, panels = new_figure(
        WIDTH * (1 if len(measures) == 1 else 0.45 + 0.55 * len(measures)), height, len(measures)
    )
    for axes, measure in zip(panels, measures, strict=True):
        _bars(axes, sets, measure, systems)
    for axes in panels[1:]:
        axes.set_yticklabels([])
    if grouped:
        legend_below(figure, panels[0])
    return figure


def _bars(axes: Axes, sets: Mapping[str, Mapping[str, Metrics]], measure: str, systems: list[str]) -> None:
    shown = {name: {s: m for s, m in rows.items() if measure in m.mean} for name, rows in sets.items()}
    shown = {name: rows for name, rows in shown.items() if rows}
    named_by_system = len(shown) == 1 < len(systems)
    named: set[str] = set()
    heights, labels = [], []
    y = 0.0
    for name, rows in shown.items():
        middle = y + (len(rows) - 1) / 2
        for system, metrics in rows.items():
            position = systems.index(system)
            value = metrics.mean[measure]
            label = None if system in named else _short(system)
            named.add(system)
            axes.barh(y, value, height=0.82, color=_color(position), label=label)
            axes.annotate(f"{value:.3f}", (value, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
            if named_by_system:
                heights.append(y)
                labels.append(_short(system))
            y += 1
        if not named_by_system:
            heights.append(middle)
            labels.append(_short(name))
        y += 0.6
    best = max((m.mean[measure] for rows in shown.values() for m in rows.values()), default=1.0)
    axes.set_xlim(0, 1.16 * max(0.05, best))
    axes.set_yticks(heights, labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.invert_yaxis()
    axes.set_title(measure_name(measure))


def recall_curves(rows: Mapping[str, Metrics]) -> Figure:
    """Recall@k of each system over k on a logarithmic axis; each curve ends at the depth of its run."""
    # Extra height for the legend, which has one line per system if there are many.
    figure, (axes,) = new_figure(height=HEIGHT + (0.17 * len(rows) if len(rows) > 2 else 0))
    for position, (name, metrics) in enumerate(rows.items()):
        points = recall_points(metrics)
        if points:
            line(axes, points, position, name)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.grid(True, axis="y")
    axes.set_xlabel("k, passages per query")
    axes.set_title("recall@k")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if len(rows) > 1:
        legend_below(figure, axes)
    return figure


def line(axes: Axes, points: Sequence[tuple[float, float]], position: int, label: str) -> None:
    """Draw a line with markers in the color of a position."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=_color(position), marker=MARKERS[position % 6], ms=4, lw=1.5, label=_short(label))


def recall_points(metrics: Metrics) -> list[tuple[int, float]]:
    """The points (k, recall@k) in ascending order of k, up to the depth of the run."""
    points = sorted((int(m.partition("@")[2]), v) for m, v in metrics.mean.items() if m.startswith("recall@"))
    if metrics.depth is None:
        return points
    inside = [(k, value) for k, value in points if k <= metrics.depth]
    beyond = [value for k, value in points if k > metrics.depth]
    if beyond and metrics.depth > max((k for k, _ in inside), default=0):
        # Recall at any deeper cut-off equals recall at the depth.
        inside.append((metrics.depth, beyond[0]))
    return inside


def scatter(pair: Pair, a: Metrics, b: Metrics) -> Figure:
    """Scatter plot of the values by query, b against a; coinciding points are merged into a larger one."""
    figure, (axes,) = new_figure(height=3.9)
    points = np.stack([values_of(a, pair.measure), values_of(b, pair.measure)], axis=1).round(3)
    distinct, counts = np.unique(points, axis=0, return_counts=True)
    difference = distinct[:, 1] - distinct[:, 0]
    axes.plot([0, 1], [0, 1], color=LINE, lw=1, zorder=1)
    for chosen, color, marker in ((difference > 0, 0, "^"), (difference < 0, 1, "v"), (difference == 0, None, "o")):
        axes.scatter(
            distinct[chosen, 0],
            distinct[chosen, 1],
            s=9 + 9 * np.sqrt(counts[chosen] - 1),
            color=MUTED if color is None else _color(color),
            marker=marker,
            alpha=0.55,
            linewidths=0,
            zorder=2,
            rasterized=len(distinct) > VECTOR_POINTS,
        )
    test = pair.test
    axes.set_title(f"▲ {test.wins:,} better", color=_color(0), fontsize=9.5)
    axes.set_title(f"▼ {test.losses:,} worse", color=_color(1), fontsize=9.5, loc="right")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.set_aspect("equal")
    axes.set_xlabel(f"{measure_name(pair.measure)} of {_short(pair.a)}")
    axes.set_ylabel(f"{measure_name(pair.measure)} of {_short(pair.b)}")
    return figure


def score_distributions(name: str, run: RankedRun, qrels: Qrels) -> Figure | None:
    """Histograms of the scores of relevant and other retrieved passages; None if the run is empty."""
    relevant, other = split_scores(run, qrels)
    scores = np.concatenate([relevant, other])
    if not len(scores):
        return None
    figure, (axes,) = new_figure()
    # Clip low outliers among the other passages.
    low, high = min(np.quantile(scores, 0.0005), relevant.min(initial=np.inf)), scores.max()
    edges = np.linspace(low, high if high > low else low + 1e-6, 41)
    for values, color, label in ((other, MUTED, "not relevant"), (relevant, _color(0), "relevant")):
        if len(values):
            shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
            axes.stairs(shares, edges, color=color, fill=True, alpha=0.35)
            axes.stairs(shares, edges, color=color, lw=1.3, label=f"{label} ({len(values):,})")
    axes.set_title(_short(name))
    axes.set_xlabel("score")
    axes.set_ylabel("share of passages")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    legend_below(figure, axes)
    return figure


def split_scores(run: RankedRun, qrels: Qrels) -> tuple[np.ndarray, np.ndarray]:
    """Finite scores of the retrieved relevant passages, and of all other retrieved passages (also unjudged ones)."""
    relevant = np.zeros(run.rows.shape, dtype=bool)
    judged = np.zeros(len(run), dtype=bool)
    row_of: dict[str, int] = {}
    wanted = {passage for grades in qrels.values() for passage, grade in grades.items() if grade > 0}
    for row in np.unique(run.rows[run.rows >= 0]).tolist():
        if run.passages[row] in wanted:
            row_of[run.passages[row]] = row
    for position, query in enumerate(run.queries):
        grades = qrels.get(query)
        if grades is not None:
            judged[position] = True
            rows = [row_of[passage] for passage, grade in grades.items() if grade > 0 and passage in row_of]
            relevant[position] = np.isin(run.rows[position], rows)
    counted = (run.rows >= 0) & judged[:, None] & np.isfinite(run.scores)
    return run.scores[counted & relevant], run.scores[counted & ~relevant]


def to_svg(figure: Figure, label: str) -> str:
    """Render an <svg> element; the page must define --ink, --muted, --line, --s0 … --s5. `label` is the ARIA label."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Remove group ids: matplotlib numbers them alike in each figure, and ids must be unique in the page.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # Two decimals are precise enough and save two thirds of the bytes.
    text = re.sub(r'="[^"]*"', lambda value: re.sub(r"(\.\d\d)\d+", r"\1", value[0]), text)
    # Use the font of the page at the size of the plot.
    text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub("#[0-9a-f]{6}", lambda color: _variable(color[0]), text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{_attribute(label)}" ', 1)


def to_png(figure: Figure, path: Path, dpi: int = 160) -> None:
    """Write a PNG file atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def _variable(color: str) -> str:
    return f"var(--{VARIABLES[color]})" if color in VARIABLES else color


def _attribute(text: str) -> str:
    from html import escape

    return escape(printable(text), quote=True)


def new_figure(width: float = WIDTH, height: float = HEIGHT, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the reports with one row of axes; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def legend_below(figure: Figure, axes: Axes) -> None:
    """Add the legend of the axes below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if sum(map(len, labels)) > 44 else len(labels)
    figure.legend(handles, labels, loc="outside lower left", ncols=max(1, columns), labelcolor=INK)


def _color(position: int) -> str:
    return SERIES[position % len(SERIES)]


def _short(name: str | None, length: int = 30) -> Any:
    if name is None or len(name) <= length:
        return name
    return name[: length - 1] + "…"
