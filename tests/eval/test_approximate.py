"""A result of an index is correct if its exact score reaches the last exact result's, whatever its id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.approximate import approximation
from eval.evaluate import exact_products, exact_search
from eval.long_documents import WINDOWS, best_of_windows, documents_of, window_id
from eval.metrics import Metrics
from eval.ranking import RankedRun
from index.files import InputError
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

METRICS = Metrics({}, {}, [])
QUERIES = ["q0", "q1", "q2"]


def store_of(folder: Path, ids: list[str], vectors: np.ndarray, **source: object) -> EmbeddingStore:
    with EmbeddingWriter(folder, dim=vectors.shape[1], model={"m": "m"}, source=source, shard_rows=7) as writer:
        writer.append([Passage(id_, "", "text") for id_ in ids], vectors)
    return EmbeddingStore.open(folder)


def integer_vectors(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Integer vectors, whose products are exact and often tie."""
    return rng.integers(-1, 2, (rows, 3)).astype(np.float32)


@pytest.mark.parametrize("depth", [1, 5, 40])
@pytest.mark.parametrize("seed", range(4))
def test_overlap_counts_results_by_their_exact_score(tmp_path: Path, seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    ids = [f"d{row:02}" for row in range(40)]
    vectors, queries = integer_vectors(rng, 40), integer_vectors(rng, 3)
    store = store_of(tmp_path / "emb", ids, vectors)
    scores, rows = exact_search(store, ids)(queries, 20)
    exact = RankedRun(QUERIES, ids, rows, scores)
    # An index over the same passages in another order, which returns random passages in random order.
    order = rng.permutation(40)
    picked = np.array([rng.permutation(40)[:20] for _ in QUERIES])
    found = RankedRun(QUERIES, [ids[row] for row in order], picked, -np.sort(rng.random((3, 20))))
    at = min(depth, 20)
    shares = []
    for query in range(3):
        products = vectors @ queries[query]
        first = [ids.index(passage) for passage in list(found[QUERIES[query]])[:at]]
        shares.append((products[first] >= np.sort(products)[-at]).mean())
    result = approximation("SQ8", exact, found, METRICS, exact_products(store, queries), depth)
    assert (result.overlap, result.depth) == (pytest.approx(np.mean(shares), abs=1e-12), at)


def test_duplicates_in_any_order_are_all_found(tmp_path: Path) -> None:
    ids = [f"d{row:03}" for row in range(300)]
    store = store_of(tmp_path / "emb", ids, np.ones((300, 4), np.float32))
    queries = np.ones((3, 4), np.float32)
    scores, rows = exact_search(store, ids)(queries, 100)
    exact = RankedRun(QUERIES, ids, rows, scores)
    found = RankedRun(QUERIES, ids, np.tile(np.arange(100), (3, 1)), np.tile(np.arange(100.0), (3, 1)))
    assert not set(exact["q0"]) & set(found["q0"])
    assert approximation("Flat", exact, found, METRICS, exact_products(store, queries)).overlap == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_overlap_of_documents_uses_their_best_window(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, 30)
    windows = [window_id(f"d{row:02}", number) for row, count in enumerate(counts) for number in range(count)]
    vectors, queries = integer_vectors(rng, len(windows)), integer_vectors(rng, 3)
    store = store_of(tmp_path / "emb", windows, vectors, **{WINDOWS: "overlap 32"})
    ids, document_of_row = documents_of(windows)
    scores, rows = best_of_windows(exact_search(store, windows), document_of_row)(queries, 8)
    exact = RankedRun(QUERIES, ids, rows, scores)
    picked = np.array([rng.permutation(30)[:8] for _ in QUERIES])
    found = RankedRun(QUERIES, ids, picked, np.zeros((3, 8)))
    best = np.array([(vectors[document_of_row == document] @ queries.T).max(axis=0) for document in range(30)]).T
    kth = np.sort(best, axis=1)[:, -8]
    shares = [(best[query, picked[query]] >= kth[query]).mean() for query in range(3)]
    result = approximation("SQ8", exact.cut(8), found, METRICS, exact_products(store, queries), 8)
    assert result.overlap == pytest.approx(np.mean(shares), abs=1e-12)


def test_missing_results_lower_the_overlap_and_unknown_passages_are_refused(tmp_path: Path) -> None:
    vectors = np.eye(3, dtype=np.float32)
    store = store_of(tmp_path / "emb", ["a", "b", "c"], vectors)
    exact = RankedRun(["q"], ["a", "b", "c"], np.array([[0, 1]]), np.array([[1.0, 0.0]]))
    products = exact_products(store, vectors[:1])
    some = RankedRun(["q"], ["a", "b", "c"], np.array([[0, -1]]), np.array([[1.0, 0.0]]))
    assert approximation("X", exact, some, METRICS, products).overlap == 0.5
    # c scores 0, as b does.
    tied = RankedRun(["q"], ["a", "b", "c"], np.array([[0, 2]]), np.array([[1.0, 0.0]]))
    assert approximation("X", exact, tied, METRICS, products).overlap == 1.0
    none = RankedRun(["q"], ["a"], np.array([[-1]]), np.array([[0.0]]))
    assert approximation("X", none, none, METRICS, products).overlap == 1.0
    with pytest.raises(InputError, match="index X: expected the passages of the set, found z"):
        approximation("X", exact, RankedRun.of({"q": {"z": 1.0}}), METRICS, products)
