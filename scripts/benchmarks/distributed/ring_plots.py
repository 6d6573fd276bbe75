"""Plots of the ring benchmark: the ablation as bars, and the kernels of one step over time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

Spans = dict[str, list[tuple[float, float]]]
TRANSFER, PRODUCT, TILES, OTHER = "transfers (NCCL)", "products", "tiles (Triton)", "other"
# An all_reduce of four numbers, in which the faster rank waits for the slower one.
AGREEMENT = "agreement (NCCL)"


def kernel_spans(events: Iterable[Any], calls: int = 1) -> Spans:
    """Start and end of every kernel in the last of `calls` equal calls, in ms from its first kernel, by kind."""
    found: list[tuple[float, float, str]] = []
    for event in events:
        # The profiler annotates NCCL calls on the GPU's lane, besides the kernels that they start.
        if "CUDA" not in str(event.device_type) or event.is_user_annotation:
            continue
        name = event.name.lower()
        if "nccl" in name:
            kind = AGREEMENT if "allreduce" in name else TRANSFER
        elif any(word in name for word in ("gemm", "cutlass", "nvjet", "cublas", "xmma")):
            kind = PRODUCT
        else:
            kind = TILES if "kernel" in name and "::" not in name else OTHER
        found.append((event.time_range.start / 1000, event.time_range.end / 1000, kind))
    last = sorted(found)[len(found) - len(found) // calls :]
    spans: Spans = {AGREEMENT: [], TRANSFER: [], PRODUCT: [], TILES: [], OTHER: []}
    for start, end, kind in last:
        spans[kind].append((start - last[0][0], end - last[0][0]))
    return spans


def hidden_share(spans: Spans) -> tuple[float, float, float]:
    """Share of the communication time in which another kernel runs, communication time, and total time in ms."""
    transfers = merge_spans(spans[TRANSFER])
    work = merge_spans([span for kind in (PRODUCT, TILES, OTHER) for span in spans[kind]])
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in transfers for b in work)
    length = sum(end - start for start, end in transfers)
    return both / length if length else 1.0, length, max((end for some in spans.values() for _, end in some), default=0)


def merge_spans(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merge overlapping spans."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def draw_profile(spans: Spans, title: str, path: Path) -> None:
    """Draw a lane for each kind of kernel."""
    figure, axes = new_figure(11, 2.6)
    for lane, (kind, some) in enumerate(spans.items()):
        axes.broken_barh([(start, end - start) for start, end in some], (lane - 0.4, 0.8), color=f"C{lane}")
        axes.text(0, lane + 0.42, kind, fontsize=7)
    axes.set(yticks=[], xlabel="ms")
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")


def draw_ablation(rows: list[dict[str, str]], path: Path) -> None:
    """Draw time and memory of each method as bars."""
    figure, both_axes = new_figure(10, 3.4, columns=2, sharey=True)
    columns = [("milliseconds", "ms, forward and backward"), ("extra_mib", "MiB beyond the embeddings")]
    for axes, (column, unit) in zip(both_axes, columns, strict=True):
        values = [float(row[column] or 0) for row in rows]
        colors = ["C0" if row["method"].startswith("ours") else "C7" for row in rows]
        axes.barh([row["method"] for row in rows], values, color=colors)
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            axes.text(value, place, f" {row[column] or row['status']}", va="center", fontsize=8)
        axes.margins(x=0.2)
        axes.set_xlabel(unit)
    axes.invert_yaxis()
    first = rows[0]
    figure.suptitle(f"{first['pairs']} pairs × {first['dim']}, {first['ranks']} × {first['hardware']}", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")


def new_figure(width: float, height: float, columns: int = 1, *, sharey: bool = False) -> Any:
    """A figure and its axes (a row of them if there are several columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained" if columns > 1 else None)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=sharey)
