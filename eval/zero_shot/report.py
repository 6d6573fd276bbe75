"""The content of a zero-shot report: table rows and notes of each set, JSON and Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

import numpy as np

from eval.reports.html import detail_rows
from eval.reports.markdown import cell, table
from eval.zero_shot.classification import Classification
from eval.zero_shot.evaluate import Evaluated

SHOWN_BROKEN = 20
SHOWN_CONFUSIONS = 10


@dataclass(frozen=True)
class ZeroShotReport:
    """A zero-shot evaluation of a model on several sets."""

    title: str
    sets: list[Evaluated]
    details: Mapping[str, Any]
    """What is needed to reproduce it: the model and its hash, versions, seeds, arithmetic."""


@dataclass(frozen=True)
class MeasureRow:
    """A formatted row of the table of measures."""

    name: str
    value: str
    chance: str
    times: str
    """The ratio of the value to chance; inverted for ranks, for which lower is better."""


def measure_rows(evaluated: Evaluated) -> list[MeasureRow]:
    """The measures of a set with their chance levels."""
    rows = []
    for name, value in evaluated.result.measures.items():
        chance, is_rank = evaluated.result.chance[name], name.endswith("rank")
        better, worse = (chance, value) if is_rank else (value, chance)
        text = "{:,.1f}" if is_rank else "{:.4f}"
        rows.append(MeasureRow(title_of(name), text.format(value), text.format(chance), f"{better / worse:.1f}"))
    return rows


def title_of(measure: str) -> str:
    """The printed name of a measure: image_retrieval_recall@5 -> "image retrieval recall@5"."""
    return measure.replace("_", " ")


def class_rows(result: Classification) -> list[tuple[str, str, str]]:
    """Rows (class, images, recall or average precision), best first; classes without an image last."""
    ordered = sorted(result.per_class, key=lambda row: (row.value is None, -(row.value or 0.0), row.name))
    return [(row.name, f"{row.images:,}", "–" if row.value is None else f"{row.value:.4f}") for row in ordered]


def confusions(result: Classification) -> list[tuple[str, str, int]]:
    """Errors as (class, predicted class, number of images), most frequent first."""
    wrong = result.labels != result.predicted
    pairs = Counter(zip(result.labels[wrong].tolist(), result.predicted[wrong].tolist(), strict=True))
    names = [row.name for row in result.per_class]
    ordered = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    return [(names[label], names[predicted], count) for (label, predicted), count in ordered]


def value_of_class(result: Classification) -> str:
    """The name of the values in the table by class."""
    return "recall" if len(result.labels) else "average precision"


def notes(evaluated: Evaluated) -> Iterator[str]:
    """Notes that explain the measures of a set."""
    dataset, result = evaluated.dataset, evaluated.result
    images = len(evaluated.images.samples)
    if isinstance(result, Classification):
        own = "the set's own" if dataset.own_templates else "the project's own"
        per_class = f"{len(dataset.templates)} prompts per class ({own})"
        if dataset.class_prompts:
            per_class = f"{sum(map(len, dataset.prompts)):,} prompts, which differ by class"
        elif dataset.other_names:
            per_class += f" with each name, several names for {len(dataset.other_names):,} classes"
        yield f"{images:,} images, {len(dataset.classes):,} classes, {per_class}. Chance: a random order."
        absent = [row.name for row in result.per_class if not row.images]
        if absent:
            counted = "are left out of the mean" if len(result.labels) else "count as 0"
            yield f"{len(absent)} classes have no image and {counted}: {listed(absent)}."
        if len(result.labels):
            if len(dataset.classes) < 5:
                yield "acc5 is undefined under five classes."
            largest = np.bincount(result.labels).max() / images
            yield f"Always naming the most frequent class would have acc1 {largest:.4f}."
    else:
        uncaptioned = images - len(result.text_ranks)
        yield (
            f"{images:,} images, {len(evaluated.captions):,} captions. Image retrieval: captions are the queries; text "
            "retrieval: images are, and any of their captions counts. Chance: a random order."
        )
        if uncaptioned:
            yield f"{uncaptioned:,} images have no caption: they are ranked but are not queries."
    yield from (f"{notice}." for notice in dataset.notices)
    if evaluated.images.broken:
        broken = [f"{name} ({why})" for name, why in evaluated.images.broken.items()]
        yield f"{len(broken):,} images cannot be read and are left out: {listed(broken)}."


def listed(names: list[str]) -> str:
    """Join the first SHOWN_BROKEN names, followed by the number of the others."""
    more = len(names) - SHOWN_BROKEN
    return ", ".join(names[:SHOWN_BROKEN]) + (f" and {more:,} more" if more > 0 else "")


def json_of(report: ZeroShotReport) -> dict[str, Any]:
    """The report as JSON."""
    return {
        "title": report.title,
        "details": dict(report.details),
        "sets": {evaluated.dataset.name: _set_json(evaluated) for evaluated in report.sets},
    }


def _set_json(evaluated: Evaluated) -> dict[str, Any]:
    dataset, result = evaluated.dataset, evaluated.result
    about: dict[str, Any] = {
        "path": str(dataset.path),
        "layout": dataset.layout,
        "task": dataset.task,
        "sha256": evaluated.sha256,
        "images": len(evaluated.images.samples),
        "broken": evaluated.images.broken,
        "measures": result.measures,
        "chance": result.chance,
        "seconds": {name: round(seconds, 3) for name, seconds in evaluated.seconds.items()},
    }
    if isinstance(result, Classification):
        about["templates"] = list(dataset.templates)
        if dataset.class_prompts or dataset.other_names:
            about["prompts"] = dict(zip(dataset.classes, dataset.prompts, strict=True))
        about["classes"] = [asdict(row) for row in result.per_class]
        if len(result.labels):
            about["confusions"] = [list(row) for row in confusions(result)[:1000]]
    else:
        about["captions"] = len(evaluated.captions)
    return about


def markdown_of(report: ZeroShotReport, images: Mapping[str, list[tuple[str, str]]]) -> str:
    """The report as Markdown.

    Args:
        report: the report.
        images: set -> (relative path, caption) of its plots and sheets.
    """
    parts = [f"# {cell(report.title)}\n"]
    for evaluated in report.sets:
        name = evaluated.dataset.name
        parts += [f"## {cell(name)}\n", summary_table(evaluated)]
        parts += [f"{cell(note)}\n" for note in notes(evaluated)]
        parts += [f"![{caption}]({quote(path)})\n" for path, caption in images.get(name, [])]
        if isinstance(evaluated.result, Classification):
            parts += _class_parts(evaluated.result)
    parts.append("## How\n")
    parts.append("".join(f"- {cell(name)}: {cell(value)}\n" for name, value in detail_rows(report.details)))
    return "\n".join(parts)


def summary_table(evaluated: Evaluated) -> str:
    """The measures of a set as a Markdown table."""
    rows = [[row.name, row.value, row.chance, row.times] for row in measure_rows(evaluated)]
    return table([cell(evaluated.dataset.name), "value", "chance", "times chance"], rows)


def _class_parts(result: Classification) -> Iterator[str]:
    if errors := confusions(result)[:SHOWN_CONFUSIONS]:
        yield "### Most frequent errors\n"
        rows = [[f"{cell(label)} as {cell(predicted)}", f"{count:,}"] for label, predicted, count in errors]
        yield table(["class", "images"], rows)
    yield "### By class\n"
    head = ["class", "images", value_of_class(result)]
    yield table(head, [[cell(name), images, value] for name, images, value in class_rows(result)])
