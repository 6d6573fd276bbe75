"""Write a zero-shot report to disk: JSON, Markdown, one HTML page, and images as PNG."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.reports import plots
from eval.reports.escaping import html_environment
from eval.reports.html import detail_rows
from eval.zero_shot import figures
from eval.zero_shot.classification import Classification
from eval.zero_shot.evaluate import Evaluated
from eval.zero_shot.figures import OpenImage
from eval.zero_shot.report import (
    SHOWN_CONFUSIONS,
    ZeroShotReport,
    class_rows,
    confusions,
    json_of,
    markdown_of,
    measure_rows,
    notes,
    value_of_class,
)
from index.files import atomic_path, write_json

# Lower than for plots: a page may contain several sheets of photographs.
SHEET_DPI = 110

Drawn = dict[str, list[tuple[str, str]]]
"""Set -> (path relative to the report, caption) of its images."""


def write(folder: Path, report: ZeroShotReport, open_image: OpenImage) -> list[Path]:
    """Write report.json, report.md, report.html and, if matplotlib is installed, SET/*.png, each atomically.

    Args:
        folder: the folder of the report.
        report: its content.
        open_image: decodes the images that are shown.

    Returns:
        The files written.
    """
    drawn: Drawn = {}
    if plots.available():
        with plots.style():
            drawn = {evaluated.dataset.name: list(_draw(folder, evaluated, open_image)) for evaluated in report.sets}
    paths = [folder / "report.json", folder / "report.md", folder / "report.html"]
    write_json(paths[0], json_of(report))
    for path, text in ((paths[1], markdown_of(report, drawn)), (paths[2], html_of(folder, report, drawn))):
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*paths, *(folder / path for images in drawn.values() for path, _ in images)]


def _draw(folder: Path, evaluated: Evaluated, open_image: OpenImage) -> Iterator[tuple[str, str]]:
    name = evaluated.dataset.name
    measures, images = evaluated.result.measures, len(evaluated.images.samples)
    if isinstance(evaluated.result, Classification):
        about = f"{name}: {images:,} images of {len(evaluated.dataset.classes):,} classes"
        what = "classes, evenly spaced in their order"
    else:
        k, chance = min(10, images), evaluated.result.chance
        about = f"{name}: one of {images:,} images is wanted"
        if (recall := f"image_retrieval_recall@{k}") in measures:
            about += f"; recall@{k} {measures[recall]:.3f}, by chance {chance[recall]:.3f}"
        what = "captions, evenly spaced from the best to the worst rank of the wanted image"
    sheet = figures.sheet(figures.nearest(evaluated), open_image, about)
    plots.to_png(sheet, folder / name / "nearest.png", SHEET_DPI)
    yield f"{name}/nearest.png", f"the nearest images of some {what}; correct ones are framed"
    if isinstance(evaluated.result, Classification) and len(evaluated.result.labels):
        plots.to_png(figures.confusion(evaluated.result), folder / name / "confusion.png")
        yield f"{name}/confusion.png", "confusion matrix, normalized by class"


def html_of(folder: Path, report: ZeroShotReport, drawn: Drawn) -> str:
    """Render the page; images are embedded as data URIs."""
    from jinja2 import PackageLoader

    environment = html_environment(PackageLoader("eval.reports"))
    sets = [_set_context(folder, evaluated, drawn.get(evaluated.dataset.name, [])) for evaluated in report.sets]
    page = environment.get_template("zero_shot.html")
    return page.render(title=report.title, sets=sets, details=list(detail_rows(report.details)))


def _set_context(folder: Path, evaluated: Evaluated, drawn: list[tuple[str, str]]) -> dict[str, Any]:
    result = evaluated.result
    shown: dict[str, Any] = {
        "name": evaluated.dataset.name,
        "rows": measure_rows(evaluated),
        "notes": list(notes(evaluated)),
        "images": [(_data_uri(folder / path), caption) for path, caption in drawn],
        "errors": [],
        "classes": [],
    }
    if isinstance(result, Classification):
        shown["errors"], shown["classes"] = confusions(result)[:SHOWN_CONFUSIONS], class_rows(result)
        shown["value"] = value_of_class(result)
    return shown


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
