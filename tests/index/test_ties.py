"""Every place that ranks passages orders those of equal scores alike (index/ties.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eval.bm25.search import Bm25
from eval.fusion import fuse
from eval.ranking import RankedRun, trec_order
from index.ann.build import build
from index.ann.index import Index
from index.ann.multi_index import MultiIndex
from index.exact import search as exact
from index.exact.top_k import merge
from index.passages import Passage
from index.ties import best_first, id_ranks, order_ties

K = 9
# In the order of code points: capitals first, digits as text, and characters of one to four bytes in UTF-8.
IDS = ["Z", "a10", "a9", "a", "é", "ﬀ", "\ufffd", "😀", "😀a", "z", "b", "_"]
QUERY = np.ones((1, 1), np.float32)
Ranked = list[str]


def expected(scores: dict[str, float]) -> Ranked:
    return sorted(scores, key=lambda id_: (scores[id_], id_.encode()), reverse=True)[:K]


def by_exact_search(scores: dict[str, float], folder: Path, make_store: Callable) -> Ranked:
    ids, vectors = list(scores), np.array(list(scores.values()), np.float32)[:, None]
    halves = [(0, vectors[:5]), (5, vectors[5:])]
    whole = exact.search(QUERY, halves, ids, K, block_rows=4)
    # Any split into parts gives the same list.
    parts = [exact.search(QUERY, [(0, half)], ids[first : first + len(half)], K) for first, half in halves]
    shifted = [(found, rows + first) for (found, rows), (first, _) in zip(parts, halves, strict=True)]
    np.testing.assert_array_equal(merge(shifted, ids, K)[1], whole[1])
    return [ids[row] for row in whole[1][0]]


def by_indexes(scores: dict[str, float], folder: Path, make_store: Callable, parts: int) -> Ranked:
    folders = []
    for number in range(parts):
        own = list(scores)[number::parts]
        vectors = np.array([[scores[id_]] for id_ in own], np.float32)
        store = make_store(vectors, own, name=f"{folder.name}-store-{number}")
        build(store, folder / f"index-{number}")
        folders.append(folder / f"index-{number}")
    index = Index.open(folders[0]) if parts == 1 else MultiIndex.open(folders)
    return index.search(QUERY, K)[1][0].tolist()


def by_runs(scores: dict[str, float], folder: Path, make_store: Callable) -> Ranked:
    run = RankedRun.of({"q": scores})
    assert [id_ for id_, _ in trec_order(scores)][:K] == list(run.cut(K)["q"])
    # A sum of equal scores is equal.
    assert list(fuse([{"q": scores}] * 2, "minmax", k=K)["q"]) == list(run.cut(K)["q"])
    return list(run.cut(K)["q"])


def by_helpers(scores: dict[str, float], folder: Path, make_store: Callable) -> Ranked:
    ids, values = list(scores), np.array(list(scores.values()), np.float32)
    order = best_first(values, id_ranks(ids))
    rows = np.argsort(-values)[None]
    sorted_scores = values[rows]
    order_ties(sorted_scores, rows, ids)
    assert rows[0].tolist() == order.tolist()
    # Two groups in one call are each in that order.
    twice = best_first(np.tile(values, 2), np.tile(id_ranks(ids), 2), np.repeat([1, 0], len(ids)))
    assert twice.tolist() == [*(order + len(ids)).tolist(), *order.tolist()]
    return [ids[row] for row in order[:K]]


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_all_searches_and_runs_order_equal_scores_alike(tmp_path: Path, make_store: Callable, levels: int) -> None:
    generator = np.random.default_rng(levels)
    for number, find in enumerate(
        (
            by_exact_search,
            lambda *given: by_indexes(*given, parts=1),
            lambda *given: by_indexes(*given, parts=2),
            by_runs,
            by_helpers,
        )
    ):
        ids = generator.permutation(IDS).tolist()
        values = generator.integers(levels, size=len(ids)) / 4 - 0.5
        scores = dict(zip(ids, values.tolist(), strict=True))
        (tmp_path / str(number)).mkdir()
        assert find(scores, tmp_path / str(number), make_store) == expected(scores), number


def test_bm25_orders_equal_scores_alike() -> None:
    texts = ["apple pear", "apple apple", "plum plum", "apple plum"]
    passages = [Passage(id_, "", texts[number % len(texts)]) for number, id_ in enumerate(IDS)]
    bm25 = Bm25(passages)
    _, rows = bm25.search_rows(["apple"], 5)
    every, all_rows = bm25.search_rows(["apple"], len(IDS))
    found = all_rows[0] >= 0
    of = {IDS[row]: float(score) for row, score in zip(all_rows[0, found], every[0, found], strict=True)}
    assert len(set(of.values())) == 2
    assert [IDS[row] for row in rows[0]] == expected(of)[:5]
