"""Zero-shot measures equal CLIP_benchmark's definitions on full matrices, and hand-computed values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from zero_shot_sets import unit

from eval.zero_shot import scores
from eval.zero_shot.chance import chance_average_precision, chance_median_rank, chance_recall
from eval.zero_shot.classification import class_vectors, classify, classify_multilabel, prompt_of
from eval.zero_shot.retrieval import retrieve
from index.files import InputError


@pytest.fixture
def chance() -> np.random.Generator:
    return np.random.default_rng(3)


def names(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def test_a_class_vector_is_the_renormalized_mean_of_its_normalized_prompts() -> None:
    table = {"a cat": [3.0, 0.0], "cat": [0.0, 0.5], "a dog": [0.0, 2.0], "dog": [0.0, 1.0]}
    found = class_vectors(["cat", "dog"], ["a {c}", "{}"], lambda texts: np.array([table[text] for text in texts]))
    assert np.allclose(found, [[np.sqrt(0.5), np.sqrt(0.5)], [0.0, 1.0]])


def test_prompts_that_cancel_out_are_refused() -> None:
    with pytest.raises(InputError, match="'cat': expected a vector with a direction"):
        class_vectors(["cat"], ["{c}", "no {c}"], lambda texts: np.array([[1.0, 0.0], [-1.0, 0.0]]))


def test_a_class_name_is_inserted_unchanged() -> None:
    assert prompt_of("a {c} and {other} {", "{0.__class__}") == "a {0.__class__} and {other} {"


def test_accuracy_by_hand() -> None:
    # Images 0 and 1 are correct, image 2 is not; class 2 has no image.
    images = np.array([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.8, 0.6, 0.0], [0.0, 1.0, 0.0]])
    found = classify(images, np.eye(3), [0, 0, 1, 1], names(3))
    assert found.measures == {"acc1": 0.75, "mean_per_class_recall": 0.75}
    assert found.chance == {"acc1": 1 / 3, "mean_per_class_recall": 1 / 3}
    assert [(row.images, row.value) for row in found.per_class] == [(2, 1.0), (2, 0.5), (0, None)]
    assert found.predicted.tolist() == [0, 0, 0, 1]


def test_ties_go_to_the_class_of_lower_index() -> None:
    found = classify(np.ones((6, 1)), np.ones((6, 1)), [0, 1, 2, 3, 4, 5], names(6))
    assert found.predicted.tolist() == [0] * 6
    assert (found.measures["acc1"], found.measures["acc5"]) == (1 / 6, 5 / 6)


def test_acc5_is_absent_under_five_classes(chance: np.random.Generator) -> None:
    images = unit(chance.normal(size=(4, 3)))
    assert "acc5" not in classify(images, images, [0, 1, 2, 3], names(4)).measures
    vectors = unit(chance.normal(size=(5, 3)))
    assert classify(images, vectors, [0, 1, 2, 3], names(5)).measures["acc5"] == 1.0


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("at_once", [1, 97, 2**22])
def test_classification_equals_the_full_matrix(
    at_once: int, chance: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "BLOCK_SCORES", at_once)
    images, vectors = unit(chance.normal(size=(211, 16))), unit(chance.normal(size=(13, 16)))
    labels = chance.integers(12, size=211)
    found = classify(images, vectors, labels, names(13))
    logits, target = torch.from_numpy(images @ vectors.T), torch.from_numpy(labels)
    hit = logits.topk(5, dim=1).indices == target[:, None]
    assert found.measures["acc1"] == pytest.approx(hit[:, :1].any(1).float().mean().item())
    assert found.measures["acc5"] == pytest.approx(hit.any(1).float().mean().item())
    from sklearn.metrics import balanced_accuracy_score

    balanced = balanced_accuracy_score(labels, logits.argmax(1).numpy())
    assert found.measures["mean_per_class_recall"] == pytest.approx(balanced)


@pytest.mark.parametrize("at_once", [1, 500, 2**22])
def test_average_precision_equals_the_full_matrix(
    at_once: int, chance: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "BLOCK_SCORES", at_once)
    images, vectors = unit(chance.normal(size=(149, 8))), unit(chance.normal(size=(11, 8)))
    dense = chance.random((149, 11)) < 0.2
    dense[:, 4] = False
    found = classify_multilabel(images, vectors, [np.flatnonzero(row).tolist() for row in dense], names(11))
    logits, truth = torch.from_numpy(images @ vectors.T), torch.from_numpy(dense)
    # CLIP_benchmark's average_precision_per_class.
    expected = torch.zeros(11)
    for column in range(11):
        ordered = truth[logits[:, column].sort(descending=True).indices, column]
        precision = ordered.float().cumsum(0) / torch.arange(1, 150)
        expected[column] = precision[ordered].sum() / max(float(ordered.sum()), 1)
    assert found.measures["mean_average_precision"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found.per_class[4].value is None
    assert found.per_class[2].value == pytest.approx(expected[2].item(), rel=1e-5)


def test_average_precision_by_hand() -> None:
    # The ranks for class 0 are 1 and 3: (1/1 + 2/3) / 2. The only image of class 1 is last of three.
    images = np.array([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]])
    found = classify_multilabel(images, np.eye(2), [[0, 1], [], [0]], names(2))
    assert [row.value for row in found.per_class] == pytest.approx([5 / 6, 1 / 3])
    assert found.measures["mean_average_precision"] == pytest.approx((5 / 6 + 1 / 3) / 2)


def test_retrieval_by_hand() -> None:
    images = unit(np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]))
    texts = unit(np.array([[1.0, 0.1], [0.1, 1.0], [0.9, 0.5], [0.1, 1.0]]))
    found = retrieve(images, texts, [0, 0, 1, 2], ks=(1, 2, 5))
    # Caption 1 of image 0 ranks it last; caption 2 finds image 1 first.
    assert found.image_ranks.tolist() == [1, 3, 1, 1]
    # Captions 1 and 3 tie for image 2: the first one in the data ranks first.
    assert found.text_ranks.tolist() == [1, 1, 2]
    assert found.measures == {
        "image_retrieval_recall@1": 0.75,
        "image_retrieval_recall@2": 0.75,
        "image_retrieval_median_rank": 1.0,
        "text_retrieval_recall@1": pytest.approx(2 / 3),
        "text_retrieval_recall@2": 1.0,
        "text_retrieval_median_rank": 1.0,
    }


@pytest.mark.parametrize("at_once", [1, 333, 2**22])
def test_retrieval_equals_the_full_matrix(
    at_once: int, chance: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "BLOCK_SCORES", at_once)
    images = unit(chance.normal(size=(37, 8)))
    owner = chance.permutation(np.concatenate([np.arange(31), chance.integers(31, size=70)]))
    texts = unit(images[owner] + chance.normal(size=(101, 8)))
    found = retrieve(images, texts, owner)
    # CLIP_benchmark's recall_at_k over dense one-hot matrices; images without captions are not queries here.
    whole, positive = torch.from_numpy(texts @ images.T), torch.zeros(101, 37, dtype=torch.bool)
    positive[torch.arange(101), torch.from_numpy(owner)] = True
    for name, table, truth in (("image", whole, positive), ("text", whole.T[:31], positive.T[:31])):
        for k in (1, 5, 10):
            top = table.topk(k, dim=1).indices
            hit = truth.gather(1, top).any(1).float().mean().item()
            assert found.measures[f"{name}_retrieval_recall@{k}"] == pytest.approx(hit)
        order = table.argsort(dim=1, descending=True)
        first = truth.gather(1, order).float().argmax(dim=1) + 1
        assert found.measures[f"{name}_retrieval_median_rank"] == np.median(first)


def test_identical_embeddings_score_chance() -> None:
    found = retrieve(np.ones((20, 2)), np.ones((20, 2)), list(range(20)))
    for measure in ("image_retrieval_recall@5", "text_retrieval_recall@10"):
        assert found.measures[measure] == pytest.approx(found.chance[measure])


def test_vectors_that_are_not_finite_are_refused_by_row() -> None:
    bad = np.ones((3, 2))
    bad[1, 0] = np.nan
    with pytest.raises(InputError, match="images: row 1: expected a finite vector"):
        retrieve(bad, np.ones((3, 2)), [0, 1, 2])
    with pytest.raises(InputError, match="images: row 1"):
        classify(bad, np.ones((2, 2)), [0, 1, 0], names(2))


def test_chance_levels_equal_the_mean_over_all_orders() -> None:
    positives, items = 3, 7
    orders = [set(places) for places in itertools.combinations(range(1, items + 1), positives)]
    for k in (1, 2, 5):
        expected = np.mean([min(places) <= k for places in orders])
        assert chance_recall({positives: 4}, items, k) == pytest.approx(expected)
    assert chance_median_rank({positives: 4}, items) == np.median([min(places) for places in orders])
    precision = [np.mean([n / place for n, place in enumerate(sorted(places), 1)]) for places in orders]
    assert chance_average_precision(positives, items) == pytest.approx(np.mean(precision))
    assert chance_average_precision(1, 1) == 1.0
    assert chance_recall({2: 1, 1: 3}, 10, 10) == 1.0
