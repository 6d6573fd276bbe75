from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from index import exact
from index.files import InputError

IDS = ["d9", "d10", "é", "z", "😀", "\ufb01", "a", "A", "aa", "_", "٣", "-1", "10", "9", "0", "e\u0301", "zz", "Z"]


def shards_of(passages: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    return [(start, passages[start : start + size]) for start in range(0, len(passages), size)]


def oracle(queries: np.ndarray, passages: np.ndarray, ids: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every product in float64; equal float32 scores by the bytes of the id, descending, as trec_eval sorts them."""
    scores = (queries.astype(np.float64) @ passages.astype(np.float64).T).astype(np.float32)
    rows = np.empty((len(queries), min(k, len(ids))), np.int64)
    for query, row_scores in enumerate(scores.tolist()):
        order = sorted(range(len(ids)), key=lambda row: (row_scores[row], ids[row].encode()), reverse=True)
        rows[query] = order[:k]
    return np.take_along_axis(scores, rows, axis=1), rows


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, len(IDS)),
    count=st.integers(1, 5),
    k=st.integers(1, 20),
    levels=st.sampled_from([1, 2, 3, 1000]),
    block_rows=st.integers(1, 20),
    shard_rows=st.integers(1, 20),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_ranking_equals_brute_force_however_many_tie(
    seed: int, rows: int, count: int, k: int, levels: int, block_rows: int, shard_rows: int, dtype: type
) -> None:
    """Small whole numbers, whose products no block size rounds: few levels tie everywhere, at the cut too."""
    rng = np.random.default_rng(seed)
    passages = rng.integers(0, levels, (rows, 3)).astype(dtype)
    queries = rng.integers(-1, levels, (count, 3)).astype(np.float32)
    ids = [IDS[place] for place in rng.permutation(len(IDS))[:rows]]
    scores, found = exact.search(queries, shards_of(passages, shard_rows), ids, k, block_rows=block_rows)
    expected_scores, expected = oracle(queries, passages, ids, k)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, expected_scores)
    assert (scores.dtype, found.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "all equal", "one query's"])
@pytest.mark.parametrize("k", [1, 7, 64, 300])
def test_every_path_through_the_blocks_ranks_the_same(rng, monkeypatch, order: str, k: int) -> None:
    """Many blocks, and few queries at a time: passages that get better, worse, stay equal, or crowd into one query."""
    passages = rng.integers(-3, 4, (1500, 8)).astype(np.float32)
    queries = rng.integers(-3, 4, (11, 8)).astype(np.float32)
    if order in ("ascending", "descending"):
        passages = passages[np.argsort(passages @ queries[0], kind="stable")][:: 1 if order == "ascending" else -1]
        queries[1:6] = queries[0]
    elif order == "all equal":
        passages[:] = passages[0]
    elif order == "one query's":
        passages[700:] = queries[3]
    ids = [f"d{n}" for n in rng.permutation(len(passages))]
    monkeypatch.setattr(exact, "SCORES_AT_ONCE", 600)
    scores, found = exact.search(queries, shards_of(passages, 411), ids, k, block_rows=128)
    expected_scores, expected = oracle(queries, passages, ids, k)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, expected_scores)


def test_real_numbers_rank_as_in_float64_and_as_faiss_flat(rng) -> None:
    passages = rng.standard_normal((3000, 48)).astype(np.float32)
    queries = rng.standard_normal((40, 48)).astype(np.float32)
    ids = [f"d{n}" for n in range(3000)]
    scores, found = exact.search(queries, shards_of(passages, 1000), ids, 20, block_rows=256)
    flat = faiss.IndexFlatIP(48)
    flat.add(passages)
    faiss_scores, faiss_rows = flat.search(queries, 20)
    np.testing.assert_array_equal(found, faiss_rows)
    np.testing.assert_allclose(scores, faiss_scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, oracle(queries, passages, ids, 20)[1])


@pytest.mark.parametrize("block_rows", [1, 17, 100, 1000, 5000])
def test_block_size_does_not_change_the_ranking(rng, block_rows: int) -> None:
    passages = rng.standard_normal((1000, 32)).astype(np.float32)
    queries = rng.standard_normal((9, 32)).astype(np.float32)
    ids = [f"d{n}" for n in range(1000)]
    expected_scores, expected = exact.search(queries, [(0, passages)], ids, 30)
    scores, found = exact.search(queries, [(0, passages)], ids, 30, block_rows=block_rows)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6, atol=1e-6)


def test_fewer_passages_than_asked_for_are_all_there_are(rng) -> None:
    passages = rng.standard_normal((5, 4)).astype(np.float32)
    scores, rows = exact.search(passages[:2], [(0, passages)], list("abcde"), 100)
    assert scores.shape == rows.shape == (2, 5)
    assert sorted(rows[0].tolist()) == [0, 1, 2, 3, 4]


def test_no_passages_and_no_queries_give_empty_results() -> None:
    none = np.empty((0, 4), np.float32)
    assert exact.search(np.ones((2, 4), np.float32), [], [], 3)[1].shape == (2, 0)
    assert exact.search(none, [(0, np.ones((5, 4), np.float32))], list("abcde"), 3)[0].shape == (0, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_is_named(value: float) -> None:
    queries = np.ones((3, 2), np.float32)
    queries[1, 0] = value
    with pytest.raises(InputError, match="query 1: expected a finite vector"):
        exact.search(queries, [(0, np.ones((4, 2), np.float32))], list("abcd"), 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_passage_that_is_not_finite_is_named(value: float, dtype: type) -> None:
    passages = np.ones((9, 2), dtype)
    passages[7, 1] = value
    with pytest.raises(InputError, match="row 7, passage 'h': expected a finite vector"):
        exact.search(np.ones((1, 2), np.float32), shards_of(passages, 4), list("abcdefghi"), 2, block_rows=3)


def test_products_that_overflow_are_refused() -> None:
    large = np.full((2, 4), 1e20, np.float32)
    with pytest.raises(InputError, match="rows 0 to 1: inner products overflow float32"):
        exact.search(large, [(0, large)], ["a", "b"], 1)


def set_legacy() -> None:
    torch.set_float32_matmul_precision("medium")


def set_by_backend() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.mark.parametrize("set_low", [set_legacy, set_by_backend])
def test_products_are_in_full_precision_whatever_is_set_outside(rng, set_low: Callable[[], None]) -> None:
    passages = rng.standard_normal((200, 64)).astype(np.float32)
    queries = rng.standard_normal((5, 64)).astype(np.float32)
    ids = [f"d{n}" for n in range(200)]
    expected = exact.search(queries, [(0, passages)], ids, 200)
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    inside: list[str] = []
    set_low()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, rows = exact.search(
                queries,
                [(0, passages)],
                ids,
                200,
                progress=lambda _: inside.extend(backend.fp32_precision for backend in backends),
            )
        assert inside == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        if set_low is set_legacy:
            torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(scores, expected[0])
    np.testing.assert_array_equal(rows, expected[1])


def test_shards_that_do_not_fit_the_ids_are_refused(rng) -> None:
    passages = rng.standard_normal((6, 4)).astype(np.float32)
    for shards, ids in (
        ([(0, passages)], list("abcde")),
        ([(0, passages)], list("abcdefg")),
        ([(0, passages[:3]), (4, passages[4:])], list("abcdef")),
        ([(0, passages[:, :3])], list("abcdef")),
    ):
        with pytest.raises(ValueError, match="shards: expected"):
            exact.search(passages[:1], shards, ids, 2)


@pytest.mark.parametrize("change", [{"k": 0}, {"block_rows": 0}])
def test_sizes_below_one_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="k, block_rows"):
        exact.search(np.ones((1, 2), np.float32), [], [], **{"k": 1, **change})
    with pytest.raises(ValueError, match="queries: expected shape"):
        exact.search(np.ones(2, np.float32), [], [], 1)


def test_progress_counts_every_row(rng) -> None:
    passages = rng.standard_normal((10, 4)).astype(np.float32)
    seen: list[int] = []
    exact.search(passages[:1], shards_of(passages, 6), list("abcdefghij"), 2, block_rows=4, progress=seen.append)
    assert seen == [4, 2, 4]


@pytest.mark.gpu
def test_the_gpu_ranks_as_the_cpu(rng) -> None:
    passages = rng.integers(-3, 4, (5000, 16)).astype(np.float32)
    queries = rng.integers(-3, 4, (50, 16)).astype(np.float32)
    ids = [f"d{n}" for n in rng.permutation(5000)]
    expected = exact.search(queries, [(0, passages)], ids, 100, block_rows=700)
    scores, rows = exact.search(queries, [(0, passages)], ids, 100, block_rows=700, device="cuda")
    np.testing.assert_array_equal(scores, expected[0])
    np.testing.assert_array_equal(rows, expected[1])
