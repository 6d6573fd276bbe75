"""Classification of image embeddings with training images: k nearest neighbors, and a linear probe.

A linear probe is multinomial logistic regression with an L2 penalty, as in CLIP (Radford et al. 2021, arXiv:2103.00020,
appendix A.3). Neighbors vote with weights exp(cosine / temperature) (Wu et al. 2018, arXiv:1805.01978), with the
settings of DINO (Caron et al. 2021, arXiv:2104.14294).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.zero_shot.classification import Classification, measured
from eval.zero_shot.scores import checked, parts, ranks_of
from index.exact.search import search
from index.files import InputError
from index.store.row_numbers import RowNumberIds

NEIGHBORS = 20
TEMPERATURE = 0.07
# Values of the regularization that are tried, from the strongest penalty to the weakest.
GRID = tuple(10.0**exponent for exponent in range(-3, 7))
# One image in five of each class is held out to choose among them.
HELD_OUT = 5
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class LabeledImages:
    """Image embeddings with their classes."""

    vectors: np.ndarray
    """Normalized, float32 [N, D]."""
    labels: np.ndarray
    """int64 [N]."""

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.vectors),) or not len(self.vectors):
            raise ValueError(f"expected a label for each image, found {self.labels.shape}, {self.vectors.shape}")

    def of(self, rows: np.ndarray) -> LabeledImages:
        """Some of the images."""
        return LabeledImages(self.vectors[rows], self.labels[rows])


@dataclass(frozen=True)
class LinearProbe:
    """The result of a linear probe."""

    result: Classification
    regularization: float
    """The chosen C: the penalty is the squared norm of the weights / 2C, beside the sum of the losses of the images."""
    held_out: Mapping[float, float]
    """acc1 on the held-out images for each C that was tried; empty if C was given."""


def nearest_neighbors(
    train: LabeledImages,
    test: LabeledImages,
    classes: Sequence[str],
    *,
    neighbors: int = NEIGHBORS,
    temperature: float = TEMPERATURE,
) -> Classification:
    """Classify images by the votes of their nearest training images.

    Of classes with equal votes, that of lower index is ranked first. Classes without a vote share the last rank: by
    index, those of low index would be among the first five of nearly every image.

    Args:
        train: the training images.
        test: the images to classify.
        classes: the C class names.
        neighbors: number of voters; all training images if there are fewer. Default: 20.
        temperature: a voter of cosine s has the weight exp(s / temperature). Default: 0.07.

    Raises:
        InputError: an embedding is not finite.
    """
    images, known = checked(test.vectors, "test"), checked(train.vectors, "train")
    scores, rows = search(images, [(0, known)], RowNumberIds(len(known)), neighbors)
    # Relative to the nearest one, so that no weight overflows.
    weights = np.exp((scores.astype(np.float64) - scores[:, :1]) / temperature)
    voted = train.labels[rows]
    ranks, predicted = np.empty_like(test.labels), np.empty_like(test.labels)
    for part in parts(len(images), len(classes)):
        votes = np.zeros((part.stop - part.start, len(classes)))
        np.add.at(votes, (np.arange(len(votes))[:, None], voted[part]), weights[part])
        own = votes[np.arange(len(votes)), test.labels[part]]
        ranks[part] = np.where(own > 0, ranks_of(votes, test.labels[part]), len(classes))
        predicted[part] = votes.argmax(axis=1)
    return measured(ranks, predicted, test.labels, classes)


def linear_probe(
    train: LabeledImages,
    test: LabeledImages,
    classes: Sequence[str],
    *,
    regularization: float | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LinearProbe:
    """Classify images by logistic regression on the training images.

    The regularization is that of GRID with the best acc1 on a held-out fifth of the training images of each class, the
    strongest of equals. The probe is then fitted to all of them.

    Args:
        train: the training images.
        test: the images to classify.
        classes: the C class names. Those without a training image are ranked last.
        regularization: C as in scikit-learn: the inverse of the penalty's strength. Default: None, chosen.
        seed: seed of the choice of held-out images. Default: 0.
        progress: called with 1 after each fit; there are len(GRID) + 1, or one if `regularization` is given.

    Raises:
        InputError: an embedding is not finite, or no class has two training images, so that none can be held out.
    """
    train = LabeledImages(checked(train.vectors, "train"), train.labels)
    test = LabeledImages(checked(test.vectors, "test", train.vectors.shape[1]), test.labels)
    held_out: dict[float, float] = {}
    if regularization is None:
        fitted, apart = (train.of(rows) for rows in _split(train.labels, seed))
        weights: np.ndarray | None = None
        for each in GRID:
            # From the strongest penalty on, each fit starts at the one before.
            weights = fit(fitted, len(classes), each, weights)
            held_out[each] = _classified(weights, apart, classes).measures["acc1"]
            if progress is not None:
                progress(1)
        regularization = max(GRID, key=lambda each: (held_out[each], -each))
    result = _classified(fit(train, len(classes), regularization), test, classes)
    if progress is not None:
        progress(1)
    return LinearProbe(result, regularization, held_out)


def fit(images: LabeledImages, classes: int, regularization: float, start: np.ndarray | None = None) -> np.ndarray:
    """Fit multinomial logistic regression by L-BFGS.

    The objective is scikit-learn's: the sum of the cross-entropies plus the squared norm of the weights / 2C, divided
    by the number of images. Intercepts are not penalized.

    Args:
        images: the training images.
        classes: the number of classes. Those without an image get weights of zero and an intercept of -inf.
        regularization: C, over 0.
        start: weights to start from, as returned. Default: None, zeros.

    Returns:
        float64 [classes, D + 1]: the weights of each class and its intercept.
    """
    from scipy.optimize import minimize

    present, labels = np.unique(images.labels, return_inverse=True)
    shape = (len(present), images.vectors.shape[1] + 1)
    initial = np.zeros(shape) if start is None else start[present]
    scale = 1 / (regularization * len(labels))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        loss, gradient = 0.5 * scale * float((weights[:, :-1] ** 2).sum()), np.zeros(shape)
        gradient[:, :-1] = scale * weights[:, :-1]
        for part in parts(len(labels), max(shape)):
            features, rows = images.vectors[part].astype(np.float64), np.arange(part.stop - part.start)
            logits = features @ weights[:, :-1].T + weights[:, -1]
            logits -= logits.max(axis=1, keepdims=True)
            probability = np.exp(logits)
            total = probability.sum(axis=1, keepdims=True)
            loss += float((np.log(total[:, 0]) - logits[rows, labels[part]]).sum()) / len(labels)
            probability /= total
            probability[rows, labels[part]] -= 1
            gradient[:, :-1] += probability.T @ features / len(labels)
            gradient[:, -1] += probability.sum(axis=0) / len(labels)
        return loss, gradient.ravel()

    options = {"maxiter": MAX_ITERATIONS, "maxfun": 10 * MAX_ITERATIONS, "gtol": 1e-5, "ftol": 1e-13}
    found = minimize(objective, initial.ravel(), jac=True, method="L-BFGS-B", options=options)
    weights = np.zeros((classes, shape[1]))
    weights[:, -1] = -np.inf
    weights[present] = found.x.reshape(shape)
    return weights


def _classified(weights: np.ndarray, images: LabeledImages, classes: Sequence[str]) -> Classification:
    ranks, predicted = np.empty_like(images.labels), np.empty_like(images.labels)
    for part in parts(len(images.labels), len(classes)):
        logits = images.vectors[part].astype(np.float64) @ weights[:, :-1].T + weights[:, -1]
        ranks[part], predicted[part] = ranks_of(logits, images.labels[part]), logits.argmax(axis=1)
    return measured(ranks, predicted, images.labels, classes)


def _split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit to, and held-out rows: a fifth of each class that has two images or more, at least one."""
    generator, apart = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels).tolist():
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            apart[rows[: max(1, len(rows) // HELD_OUT)]] = True
    if not apart.any():
        raise InputError("expected a class with two training images, to hold one out; give the regularization instead")
    return np.flatnonzero(~apart), np.flatnonzero(apart)
