"""Indexes on a real GPU, by a faiss with GPU support, and graphs of CAGRA, by one with cuVS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from index.ann.build import Plan, build
from index.ann.gpu import support
from index.ann.gpu.search import bytes_on_gpu
from index.ann.gpu.support import NotOnGpu
from index.ann.index import Index
from index.ann.tuning.recall import Target
from index.store.reader import EmbeddingStore
from index.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not hasattr(faiss, "StandardGpuResources"), reason="this faiss has no GPU support (pip install faiss-gpu-cuvs)"
    ),
]
needs_cuvs = pytest.mark.skipif(
    not hasattr(faiss, "GpuIndexCagra"), reason="this faiss has no cuVS (pip install faiss-gpu-cuvs)"
)

ROWS = 20_000


@pytest.fixture(params=[64, 100])
def vectors(request: pytest.FixtureRequest, rng) -> np.ndarray:
    """Clustered vectors at unit length."""
    centers = rng.standard_normal((200, request.param))
    drawn = centers[rng.integers(200, size=ROWS)] + 0.7 * rng.standard_normal((ROWS, request.param))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def store(make_store: Callable, vectors: np.ndarray) -> EmbeddingStore:
    return make_store(vectors, shard_rows=7_000)


@pytest.fixture
def queries(vectors: np.ndarray, rng) -> np.ndarray:
    drawn = vectors[rng.integers(ROWS, size=300)] + 0.05 * rng.standard_normal((300, vectors.shape[1]))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def shares(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean share of the expected rows [Q, k] that were found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)]))


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF128,Flat", "IVF128,SQ8", "IVF128,PQ20", "IVF128_HNSW32,Flat", "IVF128,SQ8,RFlat"]
)
def test_gpus_find_what_the_cpu_finds(tmp_path: Path, store, queries, factory: str) -> None:
    if factory == "IVF128,PQ20" and queries.shape[1] % 20:
        factory = "IVF128,PQ16"
    build(store, tmp_path / "index", Plan(factory, gpu=True))
    verify(tmp_path / "index")
    index = Index.open(tmp_path / "index")
    scores, rows = index.search_rows(queries, 10)
    on_gpu = index.to("cuda:0")
    found_scores, found = on_gpu.search_rows(queries, 10)
    # Scores differ by the rounding of float32 sums only, and so may the order of passages of almost equal scores.
    np.testing.assert_allclose(found_scores, scores, atol=2e-5 if "PQ" in factory else 2e-6)
    assert shares(found, rows) > 0.999


def test_ties_are_broken_by_id(tmp_path: Path, make_store: Callable, rng) -> None:
    vectors = rng.integers(-3, 4, size=(500, 16)).astype(np.float32)
    # Whole numbers: sums are exact in any order.
    vectors = np.concatenate([vectors, np.repeat(vectors[:5], 40, axis=0)])
    build(make_store(vectors, shard_rows=100), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    expected = index.search(vectors[:50], 20)
    found = index.to("cuda:0").search(vectors[:50], 20)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("spread", ["shards", "replicas"])
@pytest.mark.parametrize("factory", ["Flat", "IVF128,SQ8"])
def test_two_copies_find_what_one_finds(tmp_path: Path, store, queries, monkeypatch, spread: str, factory: str) -> None:
    from index.ann.gpu import search

    build(store, tmp_path / "index", Plan(factory))
    index = Index.open(tmp_path / "index")
    scores, rows = index.search_rows(queries, 10)
    # The same GPU twice, where there is one.
    monkeypatch.setattr(search, "choose_gpus", lambda device, chosen, needed: ([0, 0], chosen))
    found_scores, found = index.to("cuda", spread=spread).search_rows(queries, 10)
    np.testing.assert_allclose(found_scores, scores, atol=2e-6)
    assert shares(found, rows) > 0.999


def test_memory_is_checked_before_the_copy(tmp_path: Path, store, queries, monkeypatch) -> None:
    build(store, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert bytes_on_gpu(index.faiss) == 4 * ROWS * store.dim
    monkeypatch.setattr(support, "free_bytes", lambda gpu: 2**30)
    with pytest.raises(NotOnGpu, match=r"of free memory .* on cuda:0, found 1,024"):
        index.to("cuda:0")
    said: list[str] = []
    assert index.to("cuda:0", optional=True, note=said.append).search_rows(queries, 3)[1].shape == (300, 3)
    assert index.device == "cpu" and "searched on the CPU: expected" in said[0]


def test_the_estimate_of_memory_holds(tmp_path: Path, store) -> None:
    for factory in ("Flat", "IVF128,SQ8"):
        build(store, tmp_path / "index", Plan(factory))
        index = Index.open(tmp_path / "index")
        before = support.free_bytes(0)
        index.to("cuda:0")
        used = before - support.free_bytes(0)
        assert used <= bytes_on_gpu(index.faiss) + support.WORKSPACE_BYTES


def test_types_that_gpus_cannot_search_stay_on_the_cpu(tmp_path: Path, store, queries) -> None:
    for factory in ("IVF64,PQ4x4", "HNSW16", "SQfp16"):
        if factory == "IVF64,PQ4x4" and store.dim % 4:
            continue
        build(store, tmp_path / "index", Plan(factory))
        index = Index.open(tmp_path / "index")
        with pytest.raises(NotOnGpu):
            index.to("cuda:0")
        said: list[str] = []
        index.to("cuda:0", optional=True, note=said.append).search_rows(queries, 3)
        assert index.device == "cpu" and len(said) == 1


@needs_cuvs
def test_cagra_is_built_saved_and_searched(tmp_path: Path, store, queries, vectors) -> None:
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    build(store, tmp_path / "index", Plan("CAGRA32"))
    verify(tmp_path / "index")
    index = Index.open(tmp_path / "index")
    on_cpu = index.search_rows(queries, 10)[1]
    # The vectors have 200 clusters, each a component of the graph.
    assert shares(on_cpu, exact) > 0.9
    assert faiss.read_index(str(tmp_path / "index" / "index.faiss")).ntotal == ROWS
    scores, rows = index.to("cuda:0").search_rows(queries, 10)
    assert shares(rows, exact) > 0.95
    assert all(len(set(found)) == 10 for found in rows.tolist()), "no passage twice"
    products = np.einsum("qd,qkd->qk", queries, vectors[rows])
    np.testing.assert_allclose(scores, products, atol=2e-6)
    # One query takes another kernel than many.
    assert shares(index.search_rows(queries[:1], 10)[1], exact[:1]) >= 0.9
    assert index.search_rows(queries, 300)[1].min() >= 0


@needs_cuvs
def test_cagra_is_tuned_to_a_recall(tmp_path: Path, store, queries) -> None:
    tuning = build(store, tmp_path / "index", Plan("CAGRA32", target=Target(0.95, 10, queries)))
    assert tuning is not None and tuning.met and tuning.device == "cuda:0"
    tuning = build(store, tmp_path / "index", Plan("CAGRA32", target=Target(0.9, 10, None, 200)))
    assert tuning is not None and tuning.met
    assert Index.open(tmp_path / "index").rows == ROWS == Index.open(tmp_path / "index").faiss.ntotal
