"""A report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval.compare import Pair
from eval.measures import HEADLINE, NAMES, cutoffs, measure_name, shown
from eval.metrics import Metrics
from eval.reports.escaping import printable
from eval.sets.plan import lines_of_means
from eval.sizes import SizeResult, size_cells

if TYPE_CHECKING:
    from eval.reports.report import Changes, Report, ReportSet


def comparison_table(rows: Mapping[str, Metrics], measures: Sequence[str] | None = None, head: str = "model") -> str:
    """A Markdown table of mean values with four digits; measures that no row has are omitted.

    Args:
        rows: name -> metrics, in the order of the table ("BM25", "before training", "after training").
        measures: the columns; by default the headline measures, at the deepest available cut-offs.
        head: the heading of the first column ("model", "dataset").
    """
    known = {measure for metrics in rows.values() for measure in metrics.mean}
    columns = shown(HEADLINE, known) if measures is None else [measure for measure in measures if measure in known]
    cells = [
        [cell(name), *(f"{metrics.mean[m]:.4f}" if m in metrics.mean else "–" for m in columns)]
        for name, metrics in rows.items()
    ]
    return table([head, *map(measure_name, columns)], cells)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def cell(text: str) -> str:
    """Escape text for a table cell: one line, without characters that Markdown or HTML would interpret."""
    text = (
        " ".join(printable(text).split())
        .replace("\\", "\\\\")
        .replace("|", "/")
        .replace("&", "&amp;")
        .replace("<", "&lt;")
    )
    for sign in "*_`[]~":
        text = text.replace(sign, f"\\{sign}")
    return text


def overview_rows(report: Report) -> Iterator[tuple[str, str, list[float | None]]]:
    """Rows (set, number of queries, one value per system) of the overview, followed by the means over sets."""
    systems = report.systems
    rows: dict[str, list[ReportSet]] = {}
    for report_set in report.sets:
        rows.setdefault(report_set.row or report_set.name, []).append(report_set)
    values: dict[str, list[float | None]] = {}
    for name, parts in rows.items():
        columns = zip(*([_value(report, part, system) for system in systems] for part in parts), strict=True)
        values[name] = [_mean(column) for column in columns]
        title = name if len(parts) == 1 else f"{name} (mean of {len(parts)})"
        yield title, f"{sum(part.queries for part in parts):,}", values[name]
    for title, counted in lines_of_means(list(rows)):
        yield title, "", [_mean(column) for column in zip(*(values[name] for name in counted), strict=True)]


def _value(report: Report, report_set: ReportSet, system: str) -> float | None:
    return report_set.systems[system].mean.get(report.measure) if system in report_set.systems else None


def _mean(column: Sequence[float | None]) -> float | None:
    known = [value for value in column if value is not None]
    # A mean over fewer sets is not comparable with the other systems' means.
    return math.fsum(known) / len(known) if len(known) == len(column) else None


def p_text(p: float) -> str:
    """A p-value with four digits."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def overview_table(report: Report) -> str:
    """The overview: a row per set, a column per system, by the measure of the report; missing sets at the end."""
    head = ["set", "queries", *map(cell, report.systems)]
    rows = [
        [cell(name), queries, *("–" if value is None else f"{value:.4f}" for value in values)]
        for name, queries, values in overview_rows(report)
    ]
    rows += [[cell(name), "", *("not here" for _ in report.systems)] for name in report.absent]
    return table(head, rows)


def size_table(results: Sequence[SizeResult], measure: str) -> str:
    """A Markdown table with one row per size of the embeddings."""
    head, rows = size_cells(results, measure)
    return table([cell(name) for name in head], rows)


def summary_of(report: Report) -> str:
    """The report for a terminal: the systems and their comparisons by set, and the overview."""
    parts = []
    for report_set in report.sets:
        parts.append(comparison_table(report_set.systems, head=cell(report_set.name)))
        parts += [line + "\n" for line in notes_of(report_set)]
        if report_set.pairs:
            parts.append(_pair_table(report_set.pairs))
    if len(report.sets) > 1:
        parts.append(overview_table(report))
    return "\n".join(parts)


def _pair_table(pairs: Sequence[Pair]) -> str:
    return table(PAIR_HEAD, [[cell(first), *rest] for first, *rest in map(pair_cells, pairs)])


def markdown_of(report: Report, plotted: bool) -> str:
    """The complete report; `plotted` says whether report.png exists."""
    parts = [f"# {cell(report.title)}\n", f"{measure_name(report.measure)} by set:\n", overview_table(report)]
    if plotted:
        parts.append("![nDCG and recall by set](report.png)\n")
    if report.sizes:
        parts += ["## By size of the embeddings\n", size_table(report.sizes, report.measure)]
        parts += [f"![{measure_name(report.measure)} by size](sizes.png)\n"] if plotted else []
    for report_set in report.sets:
        parts += _set_parts(report_set)
    if report.details:
        parts += ["## How\n", "".join(f"- {key}: {detail(value)}\n" for key, value in report.details.items())]
    return "\n".join(parts)


def detail(value: Any) -> str:
    """Format a value of the details on one line."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {detail(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(detail, value))
    return str(value)


def notes_of(report_set: ReportSet) -> list[str]:
    """Notes on queries without results and on passages removed because of identical ids."""
    lines = []
    for name, metrics in report_set.systems.items():
        if metrics.missing:
            named = ", ".join(metrics.missing[:3]) + (", …" if len(metrics.missing) > 3 else "")
            total = len(metrics.per_query)
            lines.append(
                f"{name}: {len(metrics.missing):,} of {total:,} queries got no passage and count as 0: {named}"
            )
        if metrics.identical_ids_left_out:
            lines.append(left_out_line(name, metrics.identical_ids_left_out))
    return lines


def left_out_line(name: str, count: int) -> str:
    """The note on a run from which `count` unjudged passages with their query's id were removed."""
    return (
        f"{name}: passages left out because they have the id of their query and are not judged for it: {count:,} "
        "(--keep-identical-ids keeps them)"
    )


def _set_parts(report_set: ReportSet) -> list[str]:
    parts = [f"## {cell(report_set.name)}\n", comparison_table(report_set.systems, head="system")]
    parts += [line + "\n" for line in notes_of(report_set)]
    if report_set.pairs:
        parts.append(f"{measure_name(report_set.pairs[0].measure)} by query, the second system against the first:\n")
        parts.append(_pair_table(report_set.pairs))
    for changes in report_set.changes:
        parts += _changes_parts(changes)
    parts.append("### Every cut-off\n")
    for name, metrics in report_set.systems.items():
        parts += [f"{cell(name)}:\n", _cutoff_table(metrics)]
    return parts


PAIR_HEAD = ("pair", "difference", "95 % interval", "better", "worse", "same", "p (t)", "p (random)", "p (Holm)")


def pair_cells(pair: Pair) -> list[str]:
    """The cells of one row of the table of comparisons (PAIR_HEAD)."""
    test = pair.test
    return [
        f"{pair.a} → {pair.b}",
        f"{test.difference:+.4f}",
        f"{test.low:+.4f} to {test.high:+.4f}",
        *(f"{count:,}" for count in (test.wins, test.losses, test.ties)),
        *(p_text(p) for p in (test.p_t, test.p_randomisation, pair.p_corrected)),
    ]


def _changes_parts(changes: Changes) -> Iterator[str]:
    pair = changes.pair
    for word, queries in (("better", changes.better), ("worse", changes.worse)):
        if queries:
            yield f"### Queries on which {cell(pair.b)} is {word} than {cell(pair.a)}\n"
        for query in queries:
            yield (
                f"**{cell(query.text)}** ({cell(query.id)}): {measure_name(pair.measure)} "
                f"{query.value_a:.3f} → {query.value_b:.3f}\n"
            )
            yield "".join(
                f"- {'**relevant** ' if (shown.grade or 0) > 0 else ''}{cell(shown.id)}, rank "
                f"{shown.rank_a or '–'} → {shown.rank_b or '–'}: {cell(shown.text)}\n"
                for shown in query.passages
            )


def _cutoff_table(metrics: Metrics) -> str:
    """A table with measures as rows and cut-offs as columns."""
    names, ks = cutoffs(metrics.mean)
    rows = [
        [
            NAMES.get(name, name),
            *(f"{metrics.mean[f'{name}@{k}']:.4f}" if f"{name}@{k}" in metrics.mean else "–" for k in ks),
        ]
        for name in names
    ]
    return table(["at k =", *ks], rows)
