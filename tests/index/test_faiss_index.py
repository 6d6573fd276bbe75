from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from index_helpers import MODEL, flipped_bytes, listing, pairs_of, passages_of

from index.ann.build import build
from index.ann.index import Index
from index.ann.train import sample_vectors
from index.exact import search as exact
from index.files import InputError
from index.manifest import INDEX, Manifest, read_manifest, write_manifest
from index.store.reader import EmbeddingStore
from index.verify import verify


def clustered(rng: np.random.Generator, rows: int, dim: int = 16, centers: int = 40) -> np.ndarray:
    vectors = rng.standard_normal((centers, dim))[rng.integers(centers, size=rows)]
    vectors = vectors + 0.3 * rng.standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def flat(tmp_path: Path, make_store: Callable, rng) -> tuple[EmbeddingStore, Path]:
    store = make_store(clustered(rng, 50), shard_rows=20)
    build(store, tmp_path / "index")
    return store, tmp_path / "index"


def test_flat_results_equal_exact_search(flat, rng) -> None:
    store, folder = flat
    index = Index.open(folder, verify="hash")
    queries = clustered(rng, 9)
    scores, rows = index.search_rows(queries, 12)
    expected_scores, expected = exact.search(queries, store.shards(), store.ids(), 12)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)
    assert (index.rows, index.dim, index.factory, index.model) == (50, 16, "Flat", MODEL)
    assert list(index.ids) == list(store.ids())


def test_the_passage_of_a_row_is_the_one_embedded(flat) -> None:
    store, folder = flat
    index = Index.open(folder)
    passages = list(store.passages())
    assert [index.passage(row) for row in range(50)] == passages
    assert index.passage(np.int64(49)) == passages[49]
    for row in (-1, 50):
        with pytest.raises(IndexError, match=f"row {row} of an index of 50"):
            index.passage(row)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", "SQ8", "IVF8,PQ4x4fs,RFlat", "PCA8,SQfp16"])
def test_plain_faiss_reads_the_same_results_from_the_file(
    tmp_path: Path, make_store: Callable, rng, factory: str
) -> None:
    build(make_store(clustered(rng, 500), shard_rows=128), tmp_path / "index", factory=factory)
    index = Index.open(tmp_path / "index")
    queries = clustered(rng, 5)
    scores, rows = faiss.read_index(str(tmp_path / "index" / "index.faiss")).search(queries, 7)
    ours_scores, ours_rows = index.search_rows(queries, 7)
    np.testing.assert_array_equal(ours_rows, rows)
    np.testing.assert_array_equal(ours_scores, scores)
    assert index.factory == factory
    assert verify(tmp_path / "index").rows == 500


@pytest.mark.parametrize("factory", ["IVF32,Flat", "IVF32_HNSW8,SQ8", "HNSW16", "PQ16x4fs,RFlat"])
def test_approximate_indexes_reach_high_recall(tmp_path: Path, make_store: Callable, rng, factory: str) -> None:
    """Vectors without clusters: faiss's default search parameters would not reach this recall with any of the four."""
    vectors = rng.standard_normal((3050, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = vectors[3000:]
    store = make_store(vectors[:3000], shard_rows=1000)
    build(store, tmp_path / "index", factory=factory)
    found = Index.open(tmp_path / "index").search_rows(queries, 10)[1]
    expected = exact.search(queries, store.shards(), store.ids(), 10)[1]
    recall = np.mean([len({*ours} & {*theirs}) / 10 for ours, theirs in zip(found, expected, strict=True)])
    assert recall >= 0.96


def test_a_store_in_float16_is_indexed(tmp_path: Path, make_store: Callable, rng) -> None:
    store = make_store(clustered(rng, 60), shard_rows=20, dtype="float16")
    build(store, tmp_path / "index")
    queries = clustered(rng, 4)
    expected = exact.search(queries, store.shards(), store.ids(), 5)[1]
    np.testing.assert_array_equal(Index.open(tmp_path / "index").search_rows(queries, 5)[1], expected)


def test_missing_results_are_padded(tmp_path: Path, make_store: Callable, rng) -> None:
    """64 lists with one or two vectors each, of which 16 are visited: fewer than k passages are found."""
    build(make_store(clustered(rng, 100), shard_rows=64), tmp_path / "index", factory="IVF64,Flat")
    index = Index.open(tmp_path / "index")
    queries = clustered(rng, 6)
    scores, rows = index.search_rows(queries, 90)
    missing = rows < 0
    assert missing.any()
    assert (scores[missing] == -np.inf).all() and np.isfinite(scores[~missing]).all()
    assert not (missing[:, :-1] & ~missing[:, 1:]).any()
    ranked = pairs_of(index.search(queries, 90))
    assert [len(pairs) for pairs in ranked] == (~missing).sum(axis=1).tolist()
    for pairs, some_rows in zip(ranked, rows.tolist(), strict=True):
        assert [id_ for id_, _ in pairs] == [index.ids[row] for row in some_rows if row >= 0]


def test_k_larger_than_the_index_returns_all_passages(flat, rng) -> None:
    index = Index.open(flat[1])
    scores, rows = index.search_rows(clustered(rng, 3), 1000)
    assert scores.shape == rows.shape == (3, 50)
    assert [len(pairs) for pairs in pairs_of(index.search(clustered(rng, 3), 1000))] == [50, 50, 50]


def test_equal_scores_rank_by_id_descending(tmp_path: Path, make_store: Callable) -> None:
    ids = ["b", "é", "a", "B", "10", "9"]
    vectors = np.array([[1, 0], [1, 0], [2, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    build(make_store(vectors, ids), tmp_path / "index")
    index, query = Index.open(tmp_path / "index"), np.array([[1, 0]], np.float32)
    assert pairs_of(index.search(query, 6))[0] == [
        ("a", 2.0),
        ("é", 1.0),
        ("b", 1.0),
        ("B", 1.0),
        ("10", 1.0),
        ("9", 0.0),
    ]
    assert index.search_rows(query, 6)[1].tolist() == [[2, 1, 0, 3, 4, 5]]
    assert index.search_rows(query, 3)[1].tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 5, 40, 150, 300])
def test_flat_breaks_ties_at_rank_k_as_exact_search(
    tmp_path: Path, make_store: Callable, rng, levels: int, k: int
) -> None:
    """Small integers, whose products are exact: ties of a few passages, of many, and of all."""
    store = make_store(
        rng.integers(0, levels, (300, 3)), [f"d{n}" for n in rng.permutation(300)], name=f"emb{levels}", shard_rows=128
    )
    build(store, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    for count in (3, 60):  # faiss multiplies few queries in one way and many in another
        queries = rng.integers(-1, 3, (count, 3)).astype(np.float32)
        expected_scores, expected = exact.search(queries, store.shards(), store.ids(), k)
        scores, rows = index.search_rows(queries, k)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8", "SQ8"])
def test_ties_of_approximate_indexes_are_ordered_by_id(tmp_path: Path, make_store: Callable, rng, factory: str) -> None:
    build(make_store(rng.integers(0, 3, (200, 3)), shard_rows=128), tmp_path / "index", factory=factory)
    index = Index.open(tmp_path / "index")
    for pairs in pairs_of(index.search(rng.integers(-1, 3, (20, 3)).astype(np.float32), 50)):
        assert pairs == sorted(pairs, key=lambda pair: (pair[1], pair[0]), reverse=True)


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat"])
def test_a_flipped_byte_of_the_store_never_enters_an_index(
    tmp_path: Path, make_store: Callable, rng, factory: str
) -> None:
    store = make_store(clustered(rng, 30), shard_rows=20)
    for name in flipped_bytes(store.folder, rng, places=2):
        if name == "manifest.json":  # was read, and checked, when the store was opened
            continue
        with pytest.raises(InputError, match=f"{name}: damaged"):
            build(store, tmp_path / "index", factory=factory)
    assert os.listdir(tmp_path) == ["emb"]


@pytest.mark.parametrize("seed", [-1, 2**31])
@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat"])
def test_a_seed_out_of_range_is_named(tmp_path: Path, make_store: Callable, rng, seed: int, factory: str) -> None:
    with pytest.raises(InputError, match=f"seed: expected a number from 0 to 2147483647, found {seed}"):
        build(make_store(clustered(rng, 30)), tmp_path / "index", factory=factory, seed=seed)


def test_the_training_sample_is_seeded_and_covers_all_rows(tmp_path: Path, make_store: Callable, rng) -> None:
    """The first third of the rows is identical; an index trained on it alone would have empty lists."""
    vectors = clustered(rng, 3000)
    vectors[:1000] = vectors[0]
    store = make_store(vectors, shard_rows=700)
    for name, seed in (("a", 1), ("b", 1), ("c", 2**31 - 1)):
        build(store, tmp_path / name, factory="IVF16,Flat", seed=seed)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    assert listing(tmp_path / "a")["index.faiss"] != listing(tmp_path / "c")["index.faiss"]
    sample = sample_vectors(store, 300, seed=0)
    rows = [int(np.flatnonzero((vectors == vector).all(axis=1))[0]) for vector in sample]
    assert 60 <= sum(row < 1000 for row in rows) <= 140
    assert max(rows) > 2900


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nonsense", "'nonsense': expected a faiss factory string"),
        ("PQ7", "'PQ7': expected a faiss factory string for inner product and 16 dimensions"),
        ("LSH", "'LSH': expected"),
        ("IVF100,Flat", r"at least 100 vectors to train 100 centroids \(3900 to do it well\), found 50"),
        ("PQ4", r"cannot index 50 vectors: .*training points \(50\).*clusters \(256\)"),
        ("IDMap,Flat", "'IDMap,Flat': expected one without IDMap"),
    ],
)
def test_invalid_factory_strings_are_refused_and_leave_no_files(
    tmp_path: Path, make_store: Callable, rng, factory: str, message: str
) -> None:
    store = make_store(clustered(rng, 50))
    with pytest.raises(InputError, match=message) as caught:
        build(store, tmp_path / "index", factory=factory)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["emb"]


def test_auto_records_its_factory_string(tmp_path: Path, make_store: Callable, rng) -> None:
    build(make_store(clustered(rng, 30)), tmp_path / "index", factory="auto")
    assert Index.open(tmp_path / "index").factory == "Flat"


def test_an_empty_store_is_refused(tmp_path: Path, make_store: Callable) -> None:
    with pytest.raises(InputError, match="expected passages to index, found none"):
        build(make_store(np.empty((0, 4))), tmp_path / "index")


def test_progress_counts_every_row(tmp_path: Path, make_store: Callable, rng) -> None:
    seen: list[int] = []
    build(make_store(clustered(rng, 30), shard_rows=20), tmp_path / "index", progress=seen.append)
    assert seen == [20, 10]


def test_an_index_replaces_an_index_and_nothing_else(tmp_path: Path, make_store: Callable, rng) -> None:
    store = make_store(clustered(rng, 30))
    out = tmp_path / "index"
    out.mkdir()
    build(store, out)
    build(store, out, factory="SQ8")
    assert Index.open(out).factory == "SQ8"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for precious in (tmp_path / "home", tmp_path / "home" / "thesis.tex", store.folder):
        with pytest.raises(InputError, match="remove it or choose another folder"):
            build(store, precious)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_full_disk_keeps_the_old_index(tmp_path: Path, make_store: Callable, rng) -> None:
    store = make_store(clustered(rng, 300), shard_rows=100)
    small = make_store(clustered(rng, 30), name="small")
    out = tmp_path / "index"
    build(small, out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (5_000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match=str(out.name)):
                build(store, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(os.listdir(tmp_path)) == ["emb", "index", "small"]
        assert verify(out).rows == 30


def test_vectors_of_another_model_are_refused(flat) -> None:
    index = Index.open(flat[1])
    index.check_model(dict(MODEL))
    for other in ({"sha256": "cd" * 32}, {}, {**MODEL, "pooling": "cls"}):
        with pytest.raises(InputError, match="expected queries of the model that embedded its passages") as caught:
            index.check_model(other)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_query_that_is_not_finite_is_named(flat, value: float) -> None:
    queries = np.ones((3, 16), np.float32)
    queries[2, 5] = value
    with pytest.raises(InputError, match="query 2: expected a finite vector"):
        Index.open(flat[1]).search_rows(queries, 3)


def test_queries_of_another_shape_are_refused(flat) -> None:
    index = Index.open(flat[1])
    for queries in (np.ones((1, 15), np.float32), np.ones(16, np.float32)):
        with pytest.raises(ValueError, match=r"queries: expected shape \[Q, 16\]"):
            index.search_rows(queries, 3)
    with pytest.raises(ValueError, match="k: expected a number above 0"):
        index.search_rows(np.ones((1, 16), np.float32), 0)


def test_any_flipped_byte_is_detected_and_its_file_named(flat, rng) -> None:
    folder = flat[1]
    for name in flipped_bytes(folder, rng):
        with pytest.raises(InputError, match=f"{name}: "):
            verify(folder)
        with pytest.raises(InputError, match=f"{name}: "):
            Index.open(folder, verify="hash")
    assert verify(folder).files == 4


def test_every_flipped_byte_is_detected(tmp_path: Path, make_store: Callable, rng) -> None:
    """Every byte of a small store and its index, including the manifests."""
    store = make_store(rng.standard_normal((3, 2)), shard_rows=2)
    build(store, tmp_path / "index", factory="Flat")
    for folder in (store.folder, tmp_path / "index"):
        for name, data in listing(folder).items():
            for place in range(len(data)):
                damaged = bytearray(data)
                damaged[place] ^= 1 << int(rng.integers(8))
                (folder / name).write_bytes(damaged)
                with pytest.raises(InputError) as caught:
                    verify(folder)
                assert name in str(caught.value) and "\n" not in str(caught.value)
            (folder / name).write_bytes(data)
        verify(folder)


def test_truncated_files_are_refused_on_opening(flat) -> None:
    folder = flat[1]
    for name, data in listing(folder).items():
        (folder / name).write_bytes(data[:-1])
        with pytest.raises(InputError, match=f"{name}: "):
            Index.open(folder)
        (folder / name).write_bytes(data)


def test_a_forged_index_is_refused_in_one_line(flat) -> None:
    folder = flat[1]
    old = read_manifest(folder)
    for change in ({"rows": 51}, {"rows": "50"}, {"dim": 8}, {"factory": None}, {"model": 3}):
        write_manifest(Manifest(folder, INDEX, {**old.fields, **change}, old.files))
        with pytest.raises(InputError, match="expected") as caught:
            Index.open(folder)
        assert "\n" not in str(caught.value)
    write_manifest(Manifest(folder, INDEX, old.fields, {}))
    with pytest.raises(InputError, match=r"manifest\.json: expected the files index\.faiss, .* found none"):
        Index.open(folder)


def test_opening_a_store_as_an_index_is_refused(flat) -> None:
    store, folder = flat
    with pytest.raises(InputError, match="expected an index, found an embedding store"):
        Index.open(store.folder)
    with pytest.raises(InputError, match="expected an embedding store, found an index"):
        EmbeddingStore.open(folder)


def test_verify_refuses_other_folders(tmp_path: Path) -> None:
    write_manifest(Manifest(tmp_path, "checkpoint", {}, {}))
    with pytest.raises(InputError, match="expected an embedding store or an index, found a checkpoint"):
        verify(tmp_path)
    with pytest.raises(InputError, match="expected an embedding store or an index, found no manifest"):
        verify(tmp_path / "none")


def test_verify_summarizes_stores_and_indexes(flat) -> None:
    store, folder = flat
    for path, format, files in ((store.folder, "embedding store", 9), (folder, "index", 4)):
        summary = verify(path)
        assert (summary.format, summary.rows, summary.dim, summary.files) == (format, 50, 16, files)
        sizes = {name: len(data) for name, data in listing(path).items()}
        assert summary.bytes == sum(sizes.values()) - sizes["manifest.json"]


def test_the_manifest_says_how_the_index_was_made(tmp_path: Path, make_store: Callable, rng) -> None:
    build(make_store(clustered(rng, 500)), tmp_path / "index", factory="IVF4,Flat", seed=3)
    value = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert {name: value[name] for name in ("factory", "metric", "rows", "dim", "seed", "trained_on", "model")} == {
        "factory": "IVF4,Flat",
        "metric": "inner_product",
        "rows": 500,
        "dim": 16,
        "seed": 3,
        "trained_on": 500,
        "model": MODEL,
    }
    assert passages_of(["d3"])[0] == Index.open(tmp_path / "index").passage(3)
