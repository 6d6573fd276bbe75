"""A report as one HTML page without scripts or external resources; all text from data is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.measures import HEADLINE, NAMES, cutoffs, measure_name, shown
from eval.metrics import Metrics
from eval.reports.escaping import html_environment
from eval.reports.markdown import PAIR_HEAD, detail, notes_of, overview_rows, pair_cells
from eval.sizes import size_cells

if TYPE_CHECKING:
    from markupsafe import Markup

    from eval.reports.report import Report, ReportSet

# Key of the plots by size, beside names of sets, which have no slash.
SIZES = "/sizes"


@dataclass(frozen=True)
class Plot:
    """An SVG element and its caption."""

    svg: Markup
    caption: str


def html_of(report: Report, draw: bool = True) -> str:
    """Render the page; `draw` says whether to include plots."""
    from jinja2 import PackageLoader

    environment = html_environment(PackageLoader("eval.reports"))
    plots = _plots(report) if draw else {}
    return environment.get_template("report.html").render(
        report=report,
        measure=measure_name(report.measure),
        overview=list(overview_rows(report)),
        best=best_of,
        number=number,
        bars=plots.get("", []),
        size_plots=plots.get(SIZES, []),
        plots=plots,
        headline=headline(report),
        measure_name=measure_name,
        notes_of=notes_of,
        pair_head=PAIR_HEAD,
        pair_cells=pair_cells,
        cutoff_rows=cutoff_rows,
        details=list(detail_rows(report.details)),
        sizes=size_cells(report.sizes, report.measure) if report.sizes else None,
    )


def best_of(values: list[float | None]) -> float | None:
    """The highest value of a row, which is shown in bold; None for a single system."""
    known = [value for value in values if value is not None]
    return max(known) if len(values) > 1 and known else None


def number(value: float | None) -> str:
    """A value with four decimals, or a dash for None."""
    return "–" if value is None else f"{value:.4f}"


def headline(report: Report) -> list[str]:
    """The measures of the tables by set; the measure of the report comes first."""
    found = {
        measure for report_set in report.sets for metrics in report_set.systems.values() for measure in metrics.mean
    }
    return [measure for measure in dict.fromkeys((report.measure, *shown(HEADLINE, found))) if measure in found]


def cutoff_rows(metrics: Metrics) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The cut-offs, and one row (name, values) per measure."""
    names, ks = cutoffs(metrics.mean)
    return ks, [(NAMES.get(name, name), [number(metrics.mean.get(f"{name}@{k}")) for k in ks]) for name in names]


def detail_rows(details: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested details to (name, text) rows; nested names are joined by commas."""
    for key, value in details.items():
        name = f"{prefix}, {key}" if prefix else key
        if isinstance(value, Mapping):
            yield from detail_rows(value, name)
        else:
            yield name, detail(value)


def _plots(report: Report) -> dict[str, list[Plot]]:
    """Set name -> its plots; "" -> the plots of the overview; SIZES -> those by size."""
    from eval.reports import plots
    from eval.reports.sizes import size_plot

    with plots.style():
        drawn = {report_set.name: list(_set_plots(report_set)) for report_set in report.sets}
        if any(report.measure in metrics.mean for report_set in report.sets for metrics in report_set.systems.values()):
            sets = {report_set.name: report_set.systems for report_set in report.sets}
            drawn[""] = [_plot(plots.bars(sets, [report.measure]), f"{measure_name(report.measure)} by set")]
        if report.sizes:
            caption = f"{measure_name(report.measure)} by size of the embeddings"
            drawn[SIZES] = [_plot(size_plot(report.sizes, report.measure), caption)]
    return drawn


def _set_plots(found: ReportSet) -> Iterator[Plot]:
    from eval.reports import plots

    yield _plot(plots.recall_curves(found.systems), "recall of each system by cut-off")
    for changes in found.changes:
        pair = changes.pair
        drawn = plots.scatter(pair, found.systems[pair.a], found.systems[pair.b])
        yield _plot(
            drawn, f"values by query: {pair.b} (vertical) against {pair.a} (horizontal); larger points are more queries"
        )
    for system, run in found.runs.items():
        figure = plots.score_distributions(system, run, found.qrels)
        if figure is not None:
            yield _plot(figure, f"scores that {system} gives to the passages it returned")


def _plot(figure: Any, caption: str) -> Plot:
    from markupsafe import Markup

    from eval.reports.plots import to_svg

    # Safe as markup: matplotlib escapes the texts, to_svg the label.
    return Plot(Markup(to_svg(figure, caption)), caption)
