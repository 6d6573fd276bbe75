"""Zero-shot classification: class embeddings from prompt templates; accuracy, recall and average precision.

The measures are those of CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark, zeroshot_classification.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.zero_shot.chance import chance_average_precision
from eval.zero_shot.scores import blocks, checked, ranks_of
from index.files import InputError
from index.image_files.classes import prompt_of

EmbedTexts = Callable[[Sequence[str]], np.ndarray]
"""Embed T texts as float32 [T, D]."""

# Prompts per batch; all prompts of a class are in the same batch.
PROMPT_BATCH = 4096


@dataclass(frozen=True)
class ClassResult:
    """The result of one class."""

    name: str
    images: int
    value: float | None
    """Recall, or average precision for multilabel sets; None for a class without an image."""


@dataclass(frozen=True)
class Classification:
    """The result of zero-shot classification."""

    measures: dict[str, float]
    """acc1, acc5 (with at least five classes) and mean_per_class_recall; mean_average_precision for multilabel sets."""
    chance: dict[str, float]
    """Expected measures of a random ranking of the classes, or for multilabel sets of the images."""
    per_class: list[ClassResult]
    labels: np.ndarray
    """int64 [N]: the class of each image; empty for multilabel sets."""
    predicted: np.ndarray
    """int64 [N]: the predicted class of each image; empty for multilabel sets."""


def class_vectors(
    classes: Sequence[str],
    templates: Sequence[str] | Sequence[Sequence[str]],
    embed_texts: EmbedTexts,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Class embeddings by prompt ensembling: the normalized mean of the normalized embeddings of a class's prompts.

    The method is that of CLIP (Radford et al. 2021, arXiv:2103.00020, section 3.1.4).

    Args:
        classes: the C class names.
        templates: the prompt templates, with `{c}` or `{}` in place of the class name; or C lists with the whole
            prompts of each class, whose lengths may differ.
        embed_texts: embeds prompts; the embeddings need not be normalized.
        progress: called with the number of prompts embedded since the last call.

    Returns:
        float32 [C, D], normalized.

    Raises:
        InputError: an embedding or the mean of a class is zero, or an embedding is not finite.
        ValueError: there are no classes, a class has no prompt, or `embed_texts` returned another number of rows.
    """
    prompts = [[prompt_of(template, name) for template in templates if isinstance(template, str)] for name in classes]
    if not any(isinstance(template, str) for template in templates):
        prompts = [list(own) for own in templates]
    if not classes or len(prompts) != len(classes) or not all(prompts):
        raise ValueError("expected at least one class, and at least one prompt for each")
    at_once = max(1, PROMPT_BATCH // max(map(len, prompts)))
    found = []
    for start in range(0, len(classes), at_once):
        batch = prompts[start : start + at_once]
        texts = [text for own in batch for text in own]
        vectors = checked(embed_texts(texts), "prompts").astype(np.float64)
        if len(vectors) != len(texts):
            raise ValueError(f"embed_texts: expected {len(texts)} vectors, found {len(vectors)}")
        parts = np.split(_normalized(vectors, texts), np.cumsum([len(own) for own in batch])[:-1])
        mean = np.stack([part.mean(axis=0) for part in parts])
        found.append(_normalized(mean, classes[start : start + at_once]).astype(np.float32))
        if progress is not None:
            progress(len(texts))
    return np.concatenate(found)


def _normalized(vectors: np.ndarray, names: Sequence[str]) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise InputError(f"{names[int(np.argmin(lengths))]!r}: expected a vector with a direction, found zeros")
    return vectors / lengths


def classify(images: np.ndarray, vectors: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> Classification:
    """Evaluate single-label classification; ties go to the class with the lower index.

    acc1 and acc5 are top-1 and top-5 accuracy. mean_per_class_recall is the mean of the recall of each class over the
    classes that have an image (scikit-learn's balanced accuracy).

    Args:
        images: image embeddings [N, D], normalized, N at least 1.
        vectors: class embeddings [C, D].
        labels: class index of each image, [N].
        classes: the C class names.

    Raises:
        InputError: an embedding is not finite.
        ValueError: the shapes do not match.
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
    return measured(ranks, predicted, truth, classes)


def measured(ranks: np.ndarray, predicted: np.ndarray, truth: np.ndarray, classes: Sequence[str]) -> Classification:
    """The measures of predictions: acc1, acc5 and mean per-class recall, as `classify` defines them.

    Args:
        ranks: int64 [N], the rank of the true class of each image, from 1.
        predicted: int64 [N], the class of rank 1.
        truth: int64 [N], the true class.
        classes: the C class names.
    """
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
    """Evaluate multilabel classification by mean average precision.

    The average precision of a class ranks all images by their score for the class, ties by image index, and averages
    the precision at the rank of each of its images. A class without an image counts as 0, as in CLIP_benchmark.

    Args:
        images: image embeddings [N, D], normalized, N at least 1.
        vectors: class embeddings [C, D].
        labels: class indices of each image.
        classes: the C class names.

    Raises:
        InputError: an embedding is not finite.
        ValueError: the shapes do not match.
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
    empty = np.empty(0, dtype=np.int64)
    return Classification(
        {"mean_average_precision": float(precision.mean())},
        {"mean_average_precision": float(chance)},
        _per_class(classes, counts, shown),
        empty,
        empty,
    )


def _average_precision(scores: np.ndarray, rows: np.ndarray) -> float:
    rank = np.empty(len(scores), dtype=np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    found = np.sort(rank[rows])
    return float((np.arange(1, len(found) + 1) / found).mean())


def _per_class(classes: Sequence[str], counts: np.ndarray, values: np.ndarray) -> list[ClassResult]:
    rows = zip(classes, counts.tolist(), values.tolist(), strict=True)
    return [ClassResult(name, count, value if count else None) for name, count, value in rows]
