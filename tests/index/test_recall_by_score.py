"""Results count as correct by their exact score, so that an exact index has recall 1 with any number of ties."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.ann.build import Plan, build
from index.ann.edit import delete_passages, retune
from index.ann.tuning.advice import advice, exact_at_limit
from index.ann.tuning.graphs import truth_for_held_out
from index.ann.tuning.recall import ROUNDING, SPARE, Target, Truth, find_truth, recall_of_each
from index.ann.tuning.tune import tune
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

DIM = 24
NONE = np.empty(0, np.int64)


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def nearly_orthogonal(rows: int, seed: int) -> np.ndarray:
    """Two halves whose products nearly cancel: 1 - 1 + a small number."""
    half = unit(rows, seed)[:, : DIM // 2]
    return np.concatenate([half, half + 1e-7 * unit(rows, seed + 1)[:, : DIM // 2]], axis=1).astype(np.float32)


# Passages [N, D] and queries [Q, D] with many equal scores, exactly or up to rounding.
CORPORA: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "three texts": (np.repeat(unit(3, 1), 80, axis=0), unit(50, 2)),
    "one text": (np.repeat(unit(1, 1), 240, axis=0), unit(50, 2)),
    "boilerplate": (np.concatenate([np.repeat(unit(2, 1), 100, axis=0), unit(100, 3)]), unit(50, 2)),
    "last bits differ": (np.repeat(unit(4, 1), 60, axis=0) * (1 + 1e-7 * unit(240, 4)), unit(50, 2)),
    "products about 0": (
        nearly_orthogonal(240, 5),
        (nearly_orthogonal(50, 6) * np.repeat([1, -1], DIM // 2)).astype(np.float32),
    ),
    "uneven lengths": (np.repeat(unit(3, 1) * [[1], [30], [0.1]], 80, axis=0), unit(50, 2)),
    "nothing": (np.zeros((240, DIM)), unit(50, 2)),
    "all different": (unit(240, 7), unit(50, 2)),
}


@pytest.mark.parametrize(("factory", "by_queries"), [("Flat", True), ("Flat", False), ("IVF4,Flat", True)])
@pytest.mark.parametrize("name", CORPORA)
def test_an_exact_index_meets_every_target(name: str, factory: str, by_queries: bool) -> None:
    passages, queries = CORPORA[name]
    store = _Stored(passages)
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(store.vectors)
    index.add(store.vectors)
    target = Target(1.0, 10, queries if by_queries else None)
    truth = find_truth(store, target, target.held_out_rows(store.rows, 0))  # type: ignore[arg-type]
    tuning = tune(index, truth, target)
    assert tuning.met and tuning.chosen.recall == 1.0, tuning.line()


def test_an_index_of_duplicates_is_built_to_a_target(tmp_path: Path, make_store: Callable) -> None:
    store = make_store(CORPORA["three texts"][0], shard_rows=100)
    tuning = build(store, tmp_path / "ix", Plan("Flat", target=Target(0.95)))
    assert tuning is not None and tuning.met and tuning.chosen.recall == 1.0


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_an_index_with_deletions_reaches_the_target(tmp_path: Path, make_store: Callable, factory: str) -> None:
    passages, queries = CORPORA["three texts"]
    store = make_store(passages, shard_rows=100)
    build(store, tmp_path / "ix", Plan(factory))
    delete_passages(tmp_path / "ix", [f"d{row}" for row in range(0, 240, 3)])
    for target in (Target(1.0, 10, queries), Target(1.0, 10)):
        assert retune(tmp_path / "ix", store, target).chosen.recall == 1.0


def test_held_out_passages_of_a_graph_are_scored_with_ties(make_store: Callable) -> None:
    store, target = make_store(CORPORA["boilerplate"][0], shard_rows=100), Target(0.9, 10)
    held_out = target.held_out_rows(store.rows, 0)
    truth = truth_for_held_out(store, target, held_out)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(np.delete(store.vectors(), held_out, axis=0))
    assert recall_of_each(flat.search(truth.queries, 10)[1], truth).min() == 1.0


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_result_is_correct_if_its_score_reaches_the_kth(data: st.DataObject) -> None:
    """Small integers, whose products are exact, so that most of them tie."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, count = data.draw(st.sampled_from([30, 60, 200])), data.draw(st.integers(1, 40))
    vectors = rng.integers(-1, 2, (rows, 3)).astype(np.float32)
    queries = rng.integers(-1, 2, (5, 3)).astype(np.float32)
    without = np.sort(rng.choice(rows, data.draw(st.integers(0, rows // 2)), replace=False))
    left = np.delete(vectors, without, axis=0)
    store = _Stored(vectors)
    truth = find_truth(store, _Asked(queries, count), NONE, without)  # type: ignore[arg-type]
    found = np.array([rng.choice(np.r_[-1, np.arange(len(left))], truth.k, replace=False) for _ in queries])
    products = queries @ left.T
    kth = -np.sort(-products, axis=1)[:, truth.k - 1]
    expected = [
        sum(row >= 0 and products[query, row] >= kth[query] for row in rows_found) / truth.k
        for query, rows_found in enumerate(found.tolist())
    ]
    assert recall_of_each(found, truth).tolist() == expected


class _Stored:
    """The part of `EmbeddingStore` that `find_truth` uses."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = np.ascontiguousarray(vectors, np.float32)
        self.rows, self.dim = vectors.shape
        self.shard_rows = 17

    def shards(self) -> list[tuple[int, np.ndarray]]:
        return [(first, self.vectors[first : first + 17]) for first in range(0, self.rows, 17)]

    def files(self, suffix: str) -> list[str]:
        return [f"{first}.{suffix}" for first, _ in self.shards()]


class _Asked:
    """A `Target` with fewer queries than a confidence interval needs."""

    def __init__(self, queries: np.ndarray, k: int) -> None:
        self.queries, self.k = queries, k


@pytest.mark.parametrize("ties", [1, SPARE + 50])
def test_results_below_the_rounding_tolerance_are_incorrect(tmp_path: Path, ties: int) -> None:
    """Norms of 1: scores within 2e-6 of the k-th are correct, and others are not, whether listed or not."""
    near, far = 1 - ROUNDING, 1 - 4 * ROUNDING
    scores = np.r_[np.ones(ties), near, far, far].astype(np.float32)
    vectors = np.stack([scores, np.sqrt(1 - scores.astype(np.float64) ** 2)], axis=1).astype(np.float32)
    with EmbeddingWriter(tmp_path / "emb", dim=2, model={"m": "m"}, source={}) as writer:
        writer.append([Passage(f"d{row}", "", "x") for row in range(len(vectors))], vectors)
    queries = np.tile(np.array([[1, 0]], np.float32), (30, 1))
    truth = find_truth(EmbeddingStore.open(tmp_path / "emb"), Target(0.9, 1, queries), NONE)
    assert (truth.ties is not None) == (ties > SPARE)
    for row, right in ((0, 1.0), (ties - 1, 1.0), (ties, 1.0), (ties + 1, 0.0), (ties + 2, 0.0)):
        assert set(recall_of_each(np.full((30, 1), row), truth)) == {right}


def test_coarse_codes_lose_recall(make_store: Callable) -> None:
    """Any code finds duplicates of three texts, but not different passages."""
    for name, least, most in (("three texts", 1.0, 1.0), ("all different", 0.1, 0.9)):
        passages, queries = CORPORA[name]
        index = faiss.index_factory(DIM, "PQ4x4", faiss.METRIC_INNER_PRODUCT)
        index.train(passages.astype(np.float32))
        index.add(passages.astype(np.float32))
        truth = find_truth(make_store(passages, name=name, shard_rows=100), Target(0.9, 10, queries), NONE)
        assert least <= recall_of_each(index.search(truth.queries, 10)[1], truth).mean() <= most


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("SQ8", "finer code (SQfp16, Flat), or add a refinement"),
        ("SQfp16", "finer code (Flat), or add a refinement"),
        ("PQ8x4fs", "finer code (SQ8, SQfp16, Flat), or add a refinement"),
        ("IVF4,SQ8", "finer code (SQfp16, Flat), or add a refinement"),
        ("HNSW8_SQ8", "finer code (SQfp16, Flat), or add a refinement"),
        ("HNSW8", "a graph of more links"),
        ("NSG8", "a graph of more links"),
        ("IVF16_HNSW8,Flat", "its 16 lists without a graph"),
        ("PCA8,Flat", "more than 8 of 24 dimensions, or add a refinement"),
        ("PQ8x4fs,RFlat", "finer code (SQ8, SQfp16, Flat)"),
        ("PQ8x4fs,Refine(SQ8)", "or refine by exact vectors (…,RFlat)"),
        ("HNSW8_SQ8,RFlat", "finer code (SQfp16, Flat)"),
    ],
)
def test_advice_depends_on_the_index(factory: str, words: str) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    given = advice(index, mean_reaches=False)
    assert words in given and not exact_at_limit(index)
    assert ("add a refinement" in given) == ("add a refinement" in words)
    assert "by more queries" in advice(index, mean_reaches=True)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_exact_indexes_are_not_advised_to_use_finer_codes(factory: str) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    assert exact_at_limit(index) and "code" not in advice(index, mean_reaches=False)


def test_a_missed_target_comes_with_advice() -> None:
    passages, queries = CORPORA["all different"]
    index = faiss.index_factory(DIM, "PQ4x4", faiss.METRIC_INNER_PRODUCT)
    index.train(passages.astype(np.float32))
    index.add(passages.astype(np.float32))
    target = Target(0.99, 10, queries)
    truth = find_truth(_Stored(passages), target, NONE)  # type: ignore[arg-type]
    line = tune(index, truth, target).line()
    assert "NOT met" in line and line.endswith("take a finer code (SQ8, SQfp16, Flat), or add a refinement (…,RFlat)")
    assert isinstance(truth, Truth) and truth.ties is None


def test_the_result_line_omits_empty_settings() -> None:
    passages, queries = CORPORA["all different"]
    index = faiss.IndexFlatIP(DIM)
    index.add(passages.astype(np.float32))
    target = Target(0.99, 10, queries)
    line = tune(index, find_truth(_Stored(passages), target, NONE), target).line()  # type: ignore[arg-type]
    assert line.startswith("recall target 0.99 met: recall@10 1.0000, at least 1.0000; ")
