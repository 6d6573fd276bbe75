"""Building on GPUs that are replaced by CPUs: the calls to faiss, and that the file is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from index_helpers import listing

from index.ann.build import Plan, build
from index.ann.gpu import support
from index.ann.index import Index
from index.ann.tuning.recall import Target
from index.files import InputError
from index.verify import verify


class Config:
    """Stands in for faiss.GpuIndexCagraConfig."""

    graph_degree = intermediate_graph_degree = 0


class Cagra:
    """Stands in for faiss.GpuIndexCagra; faiss builds the graph on the CPU."""

    def __init__(self, resources: object, dim: int, metric: int, config: Config) -> None:
        assert metric == faiss.METRIC_INNER_PRODUCT and config.intermediate_graph_degree >= config.graph_degree
        self.made = faiss.IndexHNSWCagra(dim, config.graph_degree // 2, metric)

    def train(self, vectors: np.ndarray) -> None:
        assert vectors.dtype == np.float32
        self.made.add(vectors)


@pytest.fixture
def on_gpu() -> list[Any]:
    """Everything that was created on a GPU."""
    return []


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, on_gpu: list[Any]) -> list[Any]:
    """Make faiss find one GPU; returns what was moved on_gpu."""
    moved: list[Any] = []

    def move(index: Any) -> Any:
        moved.append(faiss.downcast_index(index))
        on_gpu.append(faiss.clone_index(index))
        return on_gpu[-1]

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", move)
    monkeypatch.setattr(support, "free_bytes", lambda gpu: 2**40)
    return moved


@pytest.fixture
def cuvs(gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make faiss a build with cuVS."""
    monkeypatch.setattr(faiss, "GpuIndexCagra", Cagra, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexCagraConfig", Config, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: index.made, raising=False)


@pytest.mark.parametrize(
    ("factory", "on_disk", "moves"),
    [
        ("IVF8,Flat", False, 2),
        ("IVF8,SQ8", False, 2),
        ("IVF8,SQ8", True, 2),
        ("OPQ4,IVF8,PQ4x4", False, 2),
        ("PCAR8,IVF8,SQ8,RFlat", False, 2),
        ("IVF8,PQ4x4fs", False, 1),
        ("SQ8", False, 0),
    ],
)
def test_gpu_builds_write_the_same_file_as_cpu_builds(
    tmp_path: Path, make_store: Callable, rng, gpus: list[Any], factory: str, on_disk: bool, moves: int
) -> None:
    store = make_store(rng.standard_normal((700, 16)), shard_rows=300)
    plan = {"memory_mib": 0.005, "on_disk": on_disk}
    build(store, tmp_path / "index", Plan(factory, **plan))
    expected = listing(tmp_path / "index")
    assert gpus == []
    build(store, tmp_path / "index", Plan(factory, gpu=True, **plan))
    assert listing(tmp_path / "index") == expected
    assert len(gpus) == moves, "centroids are moved to be found, and before to be clustered"


def test_gpu_memory_is_freed(tmp_path: Path, make_store: Callable, rng, gpus: list[Any], on_gpu: list[Any]) -> None:
    build(make_store(rng.standard_normal((700, 16))), tmp_path / "index", Plan("IVF8,Flat", gpu=True))
    # faiss owns the clustering index it is given, and never frees it.
    assert [each.thisown for each in on_gpu] == [True, True]


def test_gpu_assignment_compares_with_all_centroids(tmp_path: Path, make_store: Callable, rng, gpus: list[Any]) -> None:
    vectors = rng.standard_normal((700, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    build(make_store(vectors), tmp_path / "index", Plan("IVF8_HNSW8,Flat", gpu=True))
    assert isinstance(gpus[-1], faiss.IndexFlat) and gpus[-1].ntotal == 8
    found = Index.open(tmp_path / "index").search_rows(vectors[:20], 1)[1]
    np.testing.assert_array_equal(found[:, 0], np.arange(20))


def test_cuvs_builds_the_graph(tmp_path: Path, make_store: Callable, rng, cuvs: None) -> None:
    vectors = rng.standard_normal((700, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    counted: list[int] = []
    target = Target(0.9, 5, None, 60)
    plan = Plan("HNSW8", gpu=True, target=target)
    tuning = build(make_store(vectors, shard_rows=300), tmp_path / "index", plan, progress=counted.append)
    assert tuning is not None and tuning.met and sum(counted) == 700
    verify(tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert isinstance(index.faiss, faiss.IndexHNSWCagra) and index.faiss.ntotal == 700
    assert faiss.read_index(str(tmp_path / "index" / "index.faiss")).ntotal == 700
    assert (index.search_rows(vectors, 1)[1][:, 0] == np.arange(700)).mean() > 0.95, "rows are those of the store"


def test_without_cuvs_the_cpu_builds_the_graph(tmp_path: Path, make_store: Callable, rng, gpus: list[Any]) -> None:
    build(make_store(rng.standard_normal((100, 16))), tmp_path / "index", Plan("HNSW8", gpu=True))
    assert type(Index.open(tmp_path / "index").faiss) is faiss.IndexHNSWFlat and gpus == []


def test_a_missing_gpu_is_reported_before_reading_data(
    tmp_path: Path, make_store: Callable, rng, gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(InputError, match="gpu: expected a GPU, faiss found none"):
        build(make_store(rng.standard_normal((100, 16))), tmp_path / "index", Plan("IVF4,Flat", gpu=True))
