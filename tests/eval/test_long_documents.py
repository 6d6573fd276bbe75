"""The score of a document is the maximum over its windows, with ties broken by the document's id."""

from __future__ import annotations

import numpy as np
import pytest

from eval.long_documents import WINDOW_SEPARATOR, best_of_windows, documents_of, window_id
from eval.ranking import RankedRun
from index.exact.search import search


def test_windows_are_gathered_by_document() -> None:
    ids = [window_id("a", 0), window_id("a", 1), window_id(f"b{WINDOW_SEPARATOR}1", 0), window_id("b", 0)]
    documents, rows = documents_of(ids)
    assert documents == ["a", f"b{WINDOW_SEPARATOR}1", "b"] and rows.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_maximum_over_all_windows(seed: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.choice([1, 1, 2, 60], 40)
    # Document ids whose order differs from the order of their window ids.
    names = ["a" * (1 + n % 5) + str(n) for n in range(len(counts))]
    ids = [window_id(name, n) for name, count in zip(names, counts, strict=True) for n in range(count)]
    vectors = generator.integers(-2, 3, (len(ids), 3)) if ties else generator.normal(size=(len(ids), 3))
    vectors, queries = vectors.astype(np.float32), generator.integers(-2, 3, (7, 3)).astype(np.float32)
    documents, of_row = documents_of(ids)
    find = best_of_windows(lambda q, k: search(q, [(0, vectors)], ids, k), of_row)
    for k in (1, 5, 40, 100):
        scores, rows = find(queries, k)
        run = RankedRun([str(n) for n in range(7)], documents, rows, scores).without(np.full(7, -1), k)
        for place, query in enumerate(queries):
            best = [(vectors[of_row == n] @ query).max() for n in range(len(documents))]
            wanted = sorted(zip(best, documents, strict=True), reverse=True)[:k]
            assert list(run[str(place)].items()) == [(name, pytest.approx(value)) for value, name in wanted]


def test_ties_beyond_the_first_batch_of_windows_are_found() -> None:
    # By window id, b is first and bzb, the highest document id, is third.
    documents, of_row = documents_of([window_id(name, 0) for name in ("b", "bz", "bza", "bzb")])
    ids, vectors = [window_id(name, 0) for name in documents], np.ones((4, 1), np.float32)
    find = best_of_windows(lambda q, k: search(q, [(0, vectors)], ids, k), of_row)
    scores, rows = find(vectors[:1], 1)
    assert list(RankedRun(["q"], documents, rows, scores).without(np.array([-1]), 1)["q"]) == ["bzb"]


def test_an_approximate_search_may_return_fewer() -> None:
    found = np.array([[3.0, 2.0, -np.inf]], np.float32), np.array([[4, 5, -1]])
    scores, rows = best_of_windows(lambda queries, k: found, np.array([0, 0, 1, 1, 2, 2]))(np.zeros((1, 1)), 2)
    assert scores.tolist() == [[3.0]] and rows.tolist() == [[2]]
