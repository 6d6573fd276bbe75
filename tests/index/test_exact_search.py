from __future__ import annotations

import math
from collections.abc import Callable

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_helpers import same_bits, shards_of

from index.exact import search as exact
from index.exact import windows
from index.files import InputError

IDS = ["d9", "d10", "é", "z", "😀", "\ufb01", "a", "A", "aa", "_", "٣", "-1", "10", "9", "0", "e\u0301", "zz", "Z"]


def ranking(scores: np.ndarray, ids: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.empty((len(scores), min(k, len(ids))), np.int64)
    for query, row_scores in enumerate(scores.tolist()):
        order = sorted(range(len(ids)), key=lambda row: (row_scores[row], ids[row].encode()), reverse=True)
        rows[query] = order[:k]
    return np.take_along_axis(scores, rows, axis=1), rows


def exact_oracle(queries: np.ndarray, passages: np.ndarray, ids: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores by math.fsum, ranked by `oracle`."""
    products = queries.astype(np.float64)[:, None] * passages.astype(np.float64)
    scores = np.array([[math.fsum(pair) for pair in row] for row in products.tolist()]).astype(np.float32) + 0
    return ranking(scores, ids, k)


def oracle(queries: np.ndarray, passages: np.ndarray, ids: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64; equal float32 scores are sorted by the bytes of the id, descending, as in trec_eval."""
    return ranking((queries.astype(np.float64) @ passages.astype(np.float64).T).astype(np.float32), ids, k)


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
    writeable=st.booleans(),
)
def test_results_equal_brute_force_with_many_ties(
    seed: int,
    rows: int,
    count: int,
    k: int,
    levels: int,
    block_rows: int,
    shard_rows: int,
    dtype: type,
    writeable: bool,
) -> None:
    """Small integers, whose products are exact: there are ties everywhere, including at rank k."""
    rng = np.random.default_rng(seed)
    passages = rng.integers(0, levels, (rows, 3)).astype(dtype)
    queries = rng.integers(-1, levels, (count, 3)).astype(np.float32)
    ids = [IDS[place] for place in rng.permutation(len(IDS))[:rows]]
    passages.setflags(write=writeable)
    scores, found = exact.search(queries, shards_of(passages, shard_rows), ids, k, block_rows=block_rows)
    expected_scores, expected = oracle(queries, passages, ids, k)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, expected_scores)
    assert (scores.dtype, found.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "all equal", "one query's"])
@pytest.mark.parametrize("k", [1, 7, 64, 300])
def test_every_candidate_selection_path_gives_the_same_results(rng, monkeypatch, order: str, k: int) -> None:
    """Many blocks and few queries at a time; scores increase, decrease, stay equal, or concentrate on one query."""
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
    monkeypatch.setitem(exact.PRODUCTS_AT_ONCE, "cpu", 600)
    scores, found = exact.search(queries, shards_of(passages, 411), ids, k, block_rows=128)
    expected_scores, expected = oracle(queries, passages, ids, k)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, expected_scores)


def test_results_equal_float64_and_faiss_flat(rng) -> None:
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


def test_results_do_not_depend_on_blocks_shards_windows_and_products(rng, monkeypatch) -> None:
    passages = rng.standard_normal((1000, 37)).astype(np.float32)
    queries = rng.standard_normal((9, 37)).astype(np.float32)
    passages[500:] = passages[:500] * np.float32(1 + 2e-7)  # pairs that only the last bits tell apart
    ids = [f"d{n}" for n in rng.permutation(1000)]
    expected = exact_oracle(queries, passages, ids, 30)
    for half in (None, torch.bfloat16, torch.float16):
        monkeypatch.setattr(exact, "half_type", lambda device, half=half: half)
        for block_rows, shard_rows, window in ((1, 1000, 2**20), (17, 90, 9000), (100, 7, 2**20), (5000, 333, 40000)):
            monkeypatch.setitem(windows.WINDOW_BYTES, "cpu", window)
            # Writable arrays are copied; long read-only shards are used in place.
            for writeable in (True, False):
                passages.setflags(write=writeable)
                found = exact.search(queries, shards_of(passages, shard_rows), ids, 30, block_rows=block_rows)
                same_bits(found, expected)
            passages.setflags(write=True)


def test_copied_and_in_place_shards_can_alternate(rng, monkeypatch) -> None:
    passages = rng.standard_normal((900, 16)).astype(np.float32)
    queries = rng.standard_normal((6, 16)).astype(np.float32)
    ids = [f"d{n}" for n in rng.permutation(900)]
    monkeypatch.setitem(windows.WINDOW_BYTES, "cpu", 130 * 16 * 4)
    shards = [(start, part.copy()) for start, part in shards_of(passages, 50)]
    for number, (_, part) in enumerate(shards):
        part.setflags(write=number % 3 != 1)
    same_bits(exact.search(queries, shards, ids, 25, block_rows=40), exact_oracle(queries, passages, ids, 25))


@pytest.mark.parametrize(
    "kind", ["collapsed", "far from zero", "cancelling", "sparse", "of every size", "tiny", "huge"]
)
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_nearly_equal_vectors_are_ordered_by_exact_scores(rng, monkeypatch, kind: str, half) -> None:
    monkeypatch.setattr(exact, "half_type", lambda device: half)
    noise = rng.standard_normal((2000, 24)).astype(np.float32)
    queries = rng.standard_normal((5, 24)).astype(np.float32)
    if kind == "collapsed":
        passages = 1 + 1e-6 * noise
    elif kind == "far from zero":
        passages = noise + 1000
    elif kind == "cancelling":
        passages = np.concatenate([1e4 + noise, -1e4 - noise + 1e-3 * noise[::-1]], axis=1)
        queries = np.concatenate([queries, queries], axis=1)
    elif kind == "sparse":
        passages = np.where(rng.random(noise.shape) < 0.1, np.round(noise), 0)
        queries = np.where(rng.random(queries.shape) < 0.2, np.round(queries), 0)
    elif kind == "of every size":
        passages = noise * 10.0 ** rng.integers(-18, 15, (2000, 1))
    elif kind == "tiny":
        passages = noise * 1e-30
    else:
        passages = noise * 1e30
    passages, queries = passages.astype(np.float32), queries.astype(np.float32)
    ids = [f"d{n}" for n in rng.permutation(2000)]
    for k in (1, 10, 300):
        same_bits(
            exact.search(queries, [(0, passages)], ids, k, block_rows=700), exact_oracle(queries, passages, ids, k)
        )


def test_scores_of_half_precision_vectors_are_exact(rng) -> None:
    """Their sums often lie halfway between two float32 numbers, where the order of float64 additions matters."""
    passages = rng.standard_normal((3000, 64)).astype(np.float16)
    queries = rng.standard_normal((20, 64)).astype(np.float16).astype(np.float32)
    ids = [f"d{n}" for n in range(3000)]
    same_bits(exact.search(queries, [(0, passages)], ids, 50), exact_oracle(queries, passages, ids, 50))


def test_scores_are_exact_sums_rounded_once() -> None:
    """Sums that are wrong for any order of float64 additions, and a zero without a sign."""
    passages = np.array([[2**60, 1, -(2**60)], [2**60, -1, -(2**60)], [-1, 0, 1]], np.float32)
    scores, rows = exact.search(np.ones((1, 3), np.float32), [(0, passages)], ["a", "b", "c"], 3)
    assert (scores.tolist(), rows.tolist()) == ([[1.0, 0.0, -1.0]], [[0, 2, 1]])
    assert not np.signbit(scores[0, 1])


def test_many_candidates_stay_within_memory(rng, monkeypatch) -> None:
    """Too many candidates are scored before their window is full."""
    monkeypatch.setattr("index.exact.top_k.CANDIDATES", 10)
    passages = (1 + 1e-4 * rng.standard_normal((3000, 16))).astype(np.float32)
    ids = [f"d{n}" for n in range(3000)]
    found = exact.search(passages[:7], shards_of(passages, 500), ids, 3, block_rows=100)
    same_bits(found, exact_oracle(passages[:7], passages, ids, 3))


def test_shards_may_reuse_their_memory(rng) -> None:
    passages = rng.standard_normal((50, 4)).astype(np.float32)
    ids = [f"d{n}" for n in range(50)]

    def shards():
        room = np.empty((7, 4), np.float32)
        for first, vectors in shards_of(passages, 7):
            room[: len(vectors)] = vectors
            yield first, room[: len(vectors)]
            room[:] = np.nan

    same_bits(exact.search(passages[:3], shards(), ids, 9), exact_oracle(passages[:3], passages, ids, 9))


def test_tensors_are_searched_in_place(rng) -> None:
    passages = rng.standard_normal((500, 8)).astype(np.float32)
    ids = [f"d{n}" for n in range(500)]
    shards = [(0, torch.from_numpy(passages[:300])), (300, passages[300:])]
    same_bits(exact.search(passages[:3], shards, ids, 9, block_rows=64), exact_oracle(passages[:3], passages, ids, 9))


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_merged_partial_results_equal_one_search(rng, pieces: int) -> None:
    passages = rng.integers(-2, 3, (200, 5)).astype(np.float32)
    queries = rng.integers(-2, 3, (6, 5)).astype(np.float32)
    ids = [f"d{n}" for n in rng.permutation(200)]
    parts = []
    for some in np.array_split(np.arange(200), pieces):
        scores, rows = exact.search(queries, [(0, passages[some])], [ids[n] for n in some], 70)
        parts.append((scores, rows + some[0]))
    same_bits(exact.merge(parts, ids, 70), exact_oracle(queries, passages, ids, 70))


def test_merge_ignores_padding() -> None:
    left = (np.array([[2.0, 1.0], [5.0, -np.inf]], np.float32), np.array([[0, 1], [1, -1]]))
    right = (np.array([[1.0], [-np.inf]], np.float32), np.array([[2], [-1]]))
    scores, rows = exact.merge([left, right], ["a", "b", "c"], 3)
    assert rows.tolist() == [[0, 2, 1], [1, -1, -1]]
    assert scores.tolist() == [[2, 1, 1], [5, -np.inf, -np.inf]]
    with pytest.raises(ValueError, match="parts, k: expected lists of the same queries"):
        exact.merge([left, (right[0][:1], right[1][:1])], ["a", "b", "c"], 3)


def test_k_larger_than_the_corpus_returns_all_passages(rng) -> None:
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
def test_global_precision_settings_do_not_change_results(rng, set_low: Callable[[], None]) -> None:
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
    assert seen == [4, 4, 2]
