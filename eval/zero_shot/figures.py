"""Plots of a zero-shot report: the confusion matrix, and a sheet of the nearest images of some texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.reports.plots import INK, LINE, MUTED, SERIES
from eval.zero_shot.classification import Classification
from eval.zero_shot.evaluate import Evaluated
from eval.zero_shot.scores import blocks
from index.image_files.folders import StoredImage

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

OpenImage = Callable[[bytes, str], "Image"]
"""(content of an image file, name for errors) -> the decoded RGB image."""

# Up to MAX_CLASSES classes are drawn completely; of more, the SHOWN_CLASSES with most errors.
MAX_CLASSES, SHOWN_CLASSES = 40, 30
ROWS, COLUMNS = 12, 8
TILE = 80
# Height of a row of a sheet: an image of height 1, and its score below.
ROW_HEIGHT = 1.22
CORRECT = SERIES[2]


def confusion(result: Classification) -> Figure:
    """Confusion matrix normalized by class; of many classes, only those with most errors."""
    names = [_short(row.name) for row in result.per_class]
    counts = np.bincount(result.labels, minlength=len(names))
    errors = np.bincount(result.labels[result.labels != result.predicted], minlength=len(names))
    rows = np.flatnonzero(counts > 0)
    present = len(rows)
    if present > MAX_CLASSES:
        rows = np.sort(np.argsort(-errors, kind="stable")[:SHOWN_CLASSES])
    named = np.isin(result.labels, rows)
    columns = np.unique(np.concatenate([rows, result.predicted[named]]))
    if len(columns) > MAX_CLASSES:
        frequent = np.argsort(-np.bincount(result.predicted[named], minlength=len(names)), kind="stable")
        columns = np.sort(frequent[:SHOWN_CLASSES])
    # The last column collects all predictions without a column of their own.
    column_of = np.full(len(names), len(columns))
    column_of[columns] = np.arange(len(columns))
    matrix = np.zeros((len(rows), len(columns) + 1))
    np.add.at(matrix, (np.searchsorted(rows, result.labels[named]), column_of[result.predicted[named]]), 1)
    matrix /= counts[rows, None]
    across = [*(names[column] for column in columns), "all others"][: matrix.shape[1] - (not matrix[:, -1].any())]

    figure = _figure(3.4 + 0.19 * len(across), 2.2 + 0.19 * len(rows))
    axes = figure.subplots()
    image = axes.imshow(matrix[:, : len(across)], cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(across)), across, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), [names[row] for row in rows], fontsize=7)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    some = "" if len(rows) == present else f", the {len(rows)} of {present} classes with most errors"
    axes.set_title(f"share of a class's images{some}")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, format=lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    return figure


@dataclass(frozen=True)
class Row:
    """A text and its nearest images."""

    text: str
    wanted: StoredImage | None
    """The image of the caption; None if the text is a class."""
    images: list[tuple[StoredImage, bool, float]]
    """The images, nearest first, whether each is correct, and its score."""
    rank: int | None = None
    """Rank of the wanted image, from 1."""


def nearest(evaluated: Evaluated, rows: int = ROWS, columns: int = COLUMNS) -> list[Row]:
    """The nearest images of up to `rows` texts: classes evenly spaced in their order, captions evenly by rank.

    The captions are sorted by the rank of their image, so that the rows show the best and the worst in proportion.
    """
    samples = evaluated.images.samples
    if isinstance(evaluated.result, Classification):
        present = [number for number, row in enumerate(evaluated.result.per_class) if row.images]
        texts = list(evaluated.dataset.classes)
    else:
        # The first caption of each image.
        first = np.unique(evaluated.owners, return_index=True)[1]
        present = first[np.argsort(evaluated.result.image_ranks[first], kind="stable")].tolist()
        texts = evaluated.captions
    chosen = [
        present[n] for n in np.unique(np.linspace(0, len(present) - 1, min(rows, len(present))).round().astype(int))
    ]
    result: list[Row] = []
    for part, scores in blocks(evaluated.texts[chosen], evaluated.images.vectors):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :columns]
        for text, best, own_scores in zip(chosen[part], order.tolist(), scores, strict=True):
            if isinstance(evaluated.result, Classification):
                shown = [(samples[n].image, text in samples[n].labels, float(own_scores[n])) for n in best]
                result.append(Row(texts[text], None, shown))
            else:
                own = evaluated.owners[text]
                shown = [(samples[n].image, n == own, float(own_scores[n])) for n in best]
                rank = int(evaluated.result.image_ranks[text])
                result.append(Row(texts[text], samples[own].image, shown, rank))
    return result


def sheet(rows: Sequence[Row], open_image: OpenImage, title: str = "", first_column: str = "wanted") -> Figure:
    """Draw one row per text: the wanted image of a caption and its rank, then the nearest images with their scores.

    Correct images are framed.

    Args:
        rows: The rows.
        open_image: Decodes an image.
        title: Text above the sheet. Default: none.
        first_column: Heading of the wanted images. Default: "wanted".
    """
    wanted = any(row.wanted is not None for row in rows)
    columns = max(len(row.images) for row in rows)
    first = 1.65 if wanted else 0.0
    width, height = first + columns, len(rows)
    figure = _figure(0.62 * width + 2.9, 0.62 * ROW_HEIGHT * height + 0.3)
    axes = figure.subplots()
    for number, row in enumerate(rows):
        y = ROW_HEIGHT * number
        axes.text(-0.12, y + 0.5, _wrapped(row.text), ha="right", va="center", fontsize=8, color=INK)
        if row.wanted is not None:
            _tile(axes, row.wanted, 0, y, LINE, open_image)
            if row.rank is not None:
                color = CORRECT if row.rank <= len(row.images) else INK
                axes.text(1.28, y + 0.5, f"{row.rank:,}", ha="center", va="center", fontsize=8, color=color)
        for x, (image, right, score) in enumerate(row.images):
            _tile(axes, image, first + x, y, CORRECT if right else None, open_image)
            color = CORRECT if right else MUTED
            axes.text(first + x + 0.5, y + 1.0, f"{score:.2f}", ha="center", va="top", fontsize=5.5, color=color)
    if wanted:
        axes.text(0.5, -0.08, first_column, ha="center", va="bottom", fontsize=8, color=MUTED)
        axes.text(1.28, -0.08, "rank", ha="center", va="bottom", fontsize=8, color=MUTED)
    axes.text(first + 0.04, -0.08, "nearest first, with their scores", ha="left", va="bottom", fontsize=8, color=MUTED)
    if title:
        axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.set_xlim(-0.05, width)
    axes.set_ylim(ROW_HEIGHT * height, -0.3)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def _tile(axes: Any, at: StoredImage, x: float, y: float, frame: str | None, open_image: OpenImage) -> None:
    from matplotlib.patches import Rectangle
    from PIL import Image, ImageOps

    image = ImageOps.contain(open_image(at.read(), at.name), (TILE, TILE))
    tile = Image.new("RGB", (TILE, TILE), "white")
    tile.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    axes.imshow(np.asarray(tile), extent=(x + 0.06, x + 0.94, y + 0.94, y + 0.06), interpolation="lanczos", zorder=1)
    if frame is not None:
        thick = 1.0 if frame == LINE else 2.2
        axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, fill=False, color=frame, lw=thick, zorder=2))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(" ".join(text.split()), 30, max_lines=3, placeholder=" …"))


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
