"""Linear probes and nearest neighbors equal scikit-learn's; the regularization is chosen on held-out images."""

from __future__ import annotations

import numpy as np
import pytest
from zero_shot_sets import unit

from eval.zero_shot import scores
from eval.zero_shot.probes import GRID, LabeledImages, fit, linear_probe, nearest_neighbors
from index.files import InputError


def images(count: int, seed: int, classes: int = 6, noise: float = 1.0) -> LabeledImages:
    """Classes around fixed centers."""
    centers = np.random.default_rng(99).normal(size=(classes, 12))
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=count)
    return LabeledImages(unit(centers[labels] + noise * generator.normal(size=(count, 12))), labels)


def names(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


@pytest.mark.parametrize("at_once", [50, 2**22])
@pytest.mark.parametrize("regularization", [0.1, 1.0, 100.0])
def test_a_fit_is_that_of_scikit_learn(regularization: float, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr(scores, "BLOCK_SCORES", at_once)
    train, test = images(300, 0), images(200, 1)
    theirs = LogisticRegression(C=regularization, tol=1e-8, max_iter=10_000).fit(train.vectors, train.labels)
    weights = fit(train, 6, regularization)
    assert np.allclose(weights[:, :-1], theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())
    logits = test.vectors @ weights[:, :-1].T + weights[:, -1]
    assert np.allclose(
        logits - logits.mean(axis=1, keepdims=True), theirs.decision_function(test.vectors), atol=0.02, rtol=2e-3
    )


def test_measures_are_those_of_scikit_learn_for_the_chosen_regularization() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    train, test = images(400, 2), images(300, 3)
    steps: list[int] = []
    found = linear_probe(train, test, names(6), progress=steps.append)
    assert sum(steps) == len(GRID) + 1
    best = max(found.held_out.values())
    assert found.regularization == min(each for each in GRID if found.held_out[each] == best)
    assert best > found.held_out[GRID[0]]
    theirs = LogisticRegression(C=found.regularization, tol=1e-8, max_iter=10_000).fit(train.vectors, train.labels)
    expected = {
        "acc1": theirs.score(test.vectors, test.labels),
        "acc5": top_k_accuracy_score(test.labels, theirs.predict_proba(test.vectors), k=5),
        "mean_per_class_recall": balanced_accuracy_score(test.labels, theirs.predict(test.vectors)),
    }
    # One image of 300 may lie between two classes.
    assert found.result.measures == pytest.approx(expected, abs=0.004)
    assert found.result.chance["acc1"] == 1 / 6


def test_given_regularization_is_used_without_a_search() -> None:
    found = linear_probe(images(60, 4), images(30, 5), names(6), regularization=3.0)
    assert (found.regularization, found.held_out) == (3.0, {})


def test_a_class_without_training_images_is_ranked_last() -> None:
    train, test = images(60, 6), images(40, 7)
    train = train.of(np.flatnonzero(train.labels != 2))
    for result in (linear_probe(train, test, names(6)).result, nearest_neighbors(train, test, names(6))):
        assert not (result.predicted == 2).any() and result.per_class[2].value == 0.0


def test_one_image_per_class_leaves_none_to_hold_out() -> None:
    train = LabeledImages(np.eye(4, dtype=np.float32), np.arange(4))
    with pytest.raises(InputError, match="expected a class with two training images"):
        linear_probe(train, train, names(4))
    assert linear_probe(train, train, names(4), regularization=1.0).result.measures["acc1"] == 1.0


@pytest.mark.parametrize("neighbors", [1, 5, 20, 1000])
def test_neighbors_vote_as_in_scikit_learn(neighbors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(scores, "BLOCK_SCORES", 100)
    train, test = images(150, 8), images(120, 9)
    found = nearest_neighbors(train, test, names(6), neighbors=neighbors)
    theirs = KNeighborsClassifier(
        min(neighbors, 150), metric="cosine", algorithm="brute", weights=lambda away: np.exp((1 - away) / 0.07)
    ).fit(train.vectors, train.labels)
    votes = theirs.predict_proba(test.vectors)
    assert found.measures["acc1"] == pytest.approx(theirs.score(test.vectors, test.labels))
    assert found.measures["mean_per_class_recall"] == pytest.approx(
        balanced_accuracy_score(test.labels, theirs.predict(test.vectors))
    )
    if neighbors > 5:
        # scikit-learn also finds classes that have no vote.
        own = votes[np.arange(120), test.labels] > 0
        expected = top_k_accuracy_score(test.labels[own], votes[own], k=5, normalize=False, labels=range(6))
        assert found.measures["acc5"] == pytest.approx(expected / 120)


def test_nearest_neighbors_do_not_depend_on_the_numbers_of_the_classes() -> None:
    train, test, order = (
        images(150, 8, classes=12),
        images(120, 9, classes=12),
        np.random.default_rng(0).permutation(12),
    )
    found = nearest_neighbors(train, test, names(12), neighbors=3).measures
    renumbered = (LabeledImages(each.vectors, order[each.labels]) for each in (train, test))
    assert nearest_neighbors(*renumbered, names(12), neighbors=3).measures == pytest.approx(found)
    # Three neighbors vote for three classes at most.
    assert found["acc1"] <= found["acc5"] < 1.0


def test_a_nearer_neighbor_outvotes_two_others() -> None:
    angles = np.array([0.0, 0.9, 0.95])
    train = LabeledImages(unit(np.stack([np.cos(angles), np.sin(angles)], axis=1)), np.array([0, 1, 1]))
    test = LabeledImages(unit(np.array([[1.0, 0.05]])), np.array([0]))
    assert nearest_neighbors(train, test, names(2), neighbors=3).measures["acc1"] == 1.0
    assert nearest_neighbors(train, test, names(2), neighbors=3, temperature=100.0).measures["acc1"] == 0.0
