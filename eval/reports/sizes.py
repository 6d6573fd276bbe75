"""The metrics by size of the embeddings, as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.measures import measure_name
from eval.reports import plots
from eval.sizes import SizeResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def size_plot(results: Sequence[SizeResult], measure: str) -> Figure:
    """A measure over the bytes of an embedding, on a logarithmic axis: one line per set and precision."""
    results = sorted(results, key=lambda result: result.bytes)
    sets = list(results[0].rows)
    precisions = list(dict.fromkeys(result.precision for result in results))
    figure, (axes,) = plots.new_figure()
    for position, (name, precision) in enumerate((n, p) for n in sets for p in precisions):
        points = [
            (result.bytes, result.rows[name].mean[measure]) for result in results if result.precision == precision
        ]
        label = name if len(precisions) == 1 else f"{name}, {precision}"
        plots.line(axes, points, position, label)
    sizes = sorted({result.bytes for result in results})
    dims = {result.bytes: result.dim for result in results}
    axes.set_xscale("log")
    axes.minorticks_off()
    if len(precisions) == 1:
        texts = [str(dims[size]) for size in sizes]
        axes.set_xlabel("dimensions")
    else:
        texts = [f"{size:,}" for size in sizes]
        axes.set_xlabel("bytes per embedding")
    # A label that would overlap the one before is left out.
    gap, last = (sizes[-1] / sizes[0]) ** (1 / 9), 0.0
    for number, size in enumerate(sizes):
        if size < last * gap:
            texts[number] = ""
        else:
            last = size
    axes.set_xticks(sizes, texts)
    # Room for the markers of the highest points.
    axes.set_ylim(0, 1.08 * max(result.rows[name].mean[measure] for result in results for name in sets) or 1)
    axes.grid(True, axis="y")
    axes.set_title(f"{measure_name(measure)} by size of the embeddings")
    if len(sets) * len(precisions) > 1:
        plots.legend_below(figure, axes)
    return figure
