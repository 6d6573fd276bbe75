"""Zero-shot classification: a vector for each class from its prompts, and how often images come nearest to their own.

The measures are those of CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark, zeroshot_classification.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.zero_shot.chance import chance_average_precision
from eval.zero_shot.scores import blocks, checked, ranks_of
from index.files import InputError

EmbedTexts = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float32 [texts, D]."""

# Prompts embedded together; the prompts of one class always are.
PROMPTS_AT_ONCE = 4096


@dataclass(frozen=True)
class ClassResult:
    """What one class scored."""

    name: str
    images: int
    value: float | None
    """Recall, or average precision where images have several labels; none for a class without an image."""


@dataclass(frozen=True)
class Classification:
    """How well images find their classes."""

    measures: dict[str, float]
    """acc1, acc5 (not under five classes) and mean_per_class_recall; or mean_average_precision."""
    chance: dict[str, float]
    """What a random ranking of the classes, or of the images, is expected to score."""
    per_class: list[ClassResult]
    labels: np.ndarray
    """[N]: the class of each image; empty where images have several."""
    predicted: np.ndarray
    """[N]: the class nearest to each image; empty where images have several."""


def class_vectors(
    classes: Sequence[str],
    templates: Sequence[str],
    embed_texts: EmbedTexts,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """A vector for each class: the mean of its prompts' unit vectors, of unit length again (arXiv:2103.00020, 3.1.4).

    Args:
        classes: C names.
        templates: T prompts, `{c}` or `{}` standing for the name.
        embed_texts: embeds prompts; their lengths do not matter.
        progress: called with the number of prompts embedded since the last call.

    Returns:
        float32 [C, D].

    Raises:
        InputError: the prompts of a class cancel out, or a vector is not finite.
    """
    if not classes or not templates:
        raise ValueError("expected at least one class and one template")
    at_once = max(1, PROMPTS_AT_ONCE // len(templates))
    found = []
    for start in range(0, len(classes), at_once):
        some = classes[start : start + at_once]
        prompts = [prompt_of(template, name) for name in some for template in templates]
        vectors = checked(embed_texts(prompts), "prompts").astype(np.float64)
        if len(vectors) != len(prompts):
            raise ValueError(f"embed_texts: expected {len(prompts)} vectors, found {len(vectors)}")
        mean = _unit(vectors, prompts).reshape(len(some), len(templates), -1).mean(axis=1)
        found.append(_unit(mean, some).astype(np.float32))
        if progress is not None:
            progress(len(prompts))
    return np.concatenate(found)


def prompt_of(template: str, name: str) -> str:
    """A template with the name of a class in it; whatever else stands in braces stays as it is."""
    return template.replace("{c}", name).replace("{}", name)


def _unit(vectors: np.ndarray, names: Sequence[str]) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise InputError(f"{names[int(np.argmin(lengths))]!r}: expected a vector with a direction, found zeros")
    return vectors / lengths


def classify(images: np.ndarray, vectors: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> Classification:
    """Score images of one label each; equal scores go to the class of lower number, in the order of `classes`.

    acc1 and acc5 are the shares of images whose class is among the nearest one and five. mean_per_class_recall is the
    mean of the classes' acc1, over the classes that have an image (scikit-learn's balanced accuracy).

    Args:
        images: [N, D], of unit length, N at least 1.
        vectors: [C, D], those of the classes.
        labels: [N], the number of each image's class.
        classes: C names.

    Raises:
        InputError: a vector is not finite.
        ValueError: shapes do not fit together.
    """
    vectors = checked(vectors, "classes")
    images = checked(images, "images", vectors.shape[1])
    truth = np.asarray(labels, dtype=np.int64)
    if truth.shape != (len(images),) or not len(images) or len(vectors) != len(classes):
        raise ValueError(f"found {len(images)} images, {truth.shape} labels, {len(vectors)} of {len(classes)} classes")
    ranks, predicted = np.empty_like(truth), np.empty_like(truth)
    for part, scores in blocks(images, vectors):
        ranks[part] = ranks_of(scores, truth[part])
        predicted[part] = scores.argmax(axis=1)
    counts = np.bincount(truth, minlength=len(classes))
    hits = np.bincount(truth[ranks == 1], minlength=len(classes))
    recall = np.divide(hits, counts, out=np.full(len(classes), np.nan), where=counts > 0)
    measures = {"acc1": float((ranks == 1).mean())}
    chance = {"acc1": 1 / len(classes)}
    if len(classes) >= 5:
        measures["acc5"], chance["acc5"] = float((ranks <= 5).mean()), 5 / len(classes)
    measures["mean_per_class_recall"] = float(recall[counts > 0].mean())
    chance["mean_per_class_recall"] = 1 / len(classes)
    return Classification(measures, chance, _per_class(classes, counts, recall), truth, predicted)


def classify_multilabel(
    images: np.ndarray, vectors: np.ndarray, labels: Sequence[Sequence[int]], classes: Sequence[str]
) -> Classification:
    """Score images of any number of labels by the mean over the classes of their average precision.

    A class's average precision is the mean, over its images, of the precision at the place of each, all images being
    ranked by their score for the class; equal scores go by the number of the image. A class without an image counts
    as 0, as in CLIP_benchmark.

    Args:
        images: [N, D], of unit length, N at least 1.
        vectors: [C, D], those of the classes.
        labels: for each image the numbers of its classes.
        classes: C names.

    Raises:
        as `classify`.
    """
    vectors = checked(vectors, "classes")
    images = checked(images, "images", vectors.shape[1])
    if len(labels) != len(images) or not len(images) or len(vectors) != len(classes):
        raise ValueError(f"found {len(images)} images, {len(labels)} labels, {len(vectors)} of {len(classes)} classes")
    pairs = np.array([(c, row) for row, own in enumerate(labels) for c in sorted(set(own))], np.int64).reshape(-1, 2)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    starts = np.searchsorted(pairs[:, 0], np.arange(len(classes) + 1))
    precision = np.zeros(len(classes))
    for part, scores in blocks(vectors, images):
        for column in range(part.start, part.stop):
            rows = pairs[starts[column] : starts[column + 1], 1]
            if len(rows):
                precision[column] = _average_precision(scores[column - part.start], rows)
    counts = np.diff(starts)
    chance = np.mean([chance_average_precision(int(count), len(images)) for count in counts])
    shown = np.where(counts > 0, precision, np.nan)
    nothing = np.empty(0, dtype=np.int64)
    return Classification(
        {"mean_average_precision": float(precision.mean())},
        {"mean_average_precision": float(chance)},
        _per_class(classes, counts, shown),
        nothing,
        nothing,
    )


def _average_precision(scores: np.ndarray, rows: np.ndarray) -> float:
    place = np.empty(len(scores), dtype=np.int64)
    place[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    found = np.sort(place[rows])
    return float((np.arange(1, len(found) + 1) / found).mean())


def _per_class(classes: Sequence[str], counts: np.ndarray, values: np.ndarray) -> list[ClassResult]:
    rows = zip(classes, counts.tolist(), values.tolist(), strict=True)
    return [ClassResult(name, count, value if count else None) for name, count, value in rows]
