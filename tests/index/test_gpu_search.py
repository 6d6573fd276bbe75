"""Searching on GPUs that are replaced by CPUs: what is copied, what is refused, what the CPU answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from gpu_stand_ins import Gpus

from index.ann.build import Plan, build
from index.ann.edit import retune
from index.ann.factory import make
from index.ann.gpu.search import MAX_RESULTS, bytes_on_gpu
from index.ann.gpu.support import WORKSPACE_BYTES, NotOnGpu
from index.ann.index import Index
from index.ann.multi_index import MultiIndex
from index.ann.tuning.recall import Target
from index.files import InputError
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return Gpus(monkeypatch)


@pytest.fixture
def make_index(tmp_path: Path, make_store: Callable, rng) -> Callable[..., Index]:
    """A function that builds an index of `rows` vectors at unit length and opens it."""

    def make(factory: str, rows: int = 400) -> Index:
        vectors = rng.standard_normal((rows, 16)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        build(make_store(vectors, shard_rows=300), tmp_path / "index", factory=factory)
        return Index.open(tmp_path / "index")

    return make


@pytest.mark.parametrize(
    "factory",
    ["Flat", "IVF8,Flat", "IVF8,SQ8", "IVF8_HNSW8,Flat", "PCAR8,IVF8,SQ8,RFlat"],
)
def test_gpus_find_what_the_cpu_finds(make_index, rng, gpus: Gpus, factory: str) -> None:
    index = make_index(factory)
    queries = rng.standard_normal((9, 16)).astype(np.float32)
    expected = index.search_rows(queries, 10)
    said: list[str] = []
    found = index.to("cuda:0", note=said.append).search_rows(queries, 10)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert gpus.copies == [([0], False)] and index.device == "cuda:0"
    assert said == [f"{index.folder}: searched on cuda:0"]
    assert index.to("cpu").device == "cpu"
    np.testing.assert_array_equal(index.search_rows(queries, 10)[1], expected[1])


def test_ties_are_broken_by_id_on_gpus_too(tmp_path: Path, make_store: Callable, gpus: Gpus) -> None:
    build(make_store(np.ones((60, 8), np.float32)), tmp_path / "index")
    index = Index.open(tmp_path / "index").to("cuda")
    _, ids = index.search(np.ones((2, 8), np.float32), 5)
    assert ids[0].tolist() == sorted((f"d{row}" for row in range(60)), reverse=True)[:5]


@pytest.mark.parametrize(
    ("factory", "found"),
    [
        ("HNSW8", "IndexHNSWFlat"),
        ("SQ8", "IndexScalarQuantizer"),
        ("IVF8,PQ4x4fs", "IndexIVFPQFastScan"),
        ("CAGRA8", "faiss with cuVS"),
    ],
)
def test_types_that_gpus_cannot_search_are_named(make_index, gpus: Gpus, factory: str, found: str) -> None:
    if factory == "CAGRA8":
        index = make_index("Flat")
        graph = faiss.IndexHNSWCagra(16, 4, faiss.METRIC_INNER_PRODUCT)
        graph.base_level_only = True
        index.__dict__["faiss"] = graph
    else:
        index = make_index(factory)
    with pytest.raises(NotOnGpu, match=f"{index.folder}: cannot be searched on cuda: .*{found}"):
        index.to("cuda")
    said: list[str] = []
    index.to("cuda", optional=True, note=said.append)
    assert index.device == "cpu" and len(said) == 1 and "searched on the CPU: " in said[0]


def test_a_graph_without_all_of_its_links_is_not_copied(make_index, rng, gpus: Gpus, monkeypatch) -> None:
    monkeypatch.setattr(faiss, "GpuIndexCagra", object, raising=False)
    index = make_index("Flat")
    graph = faiss.IndexHNSWCagra(16, 4, faiss.METRIC_INNER_PRODUCT)
    graph.add(rng.standard_normal((400, 16)).astype(np.float32))
    graph.base_level_only = True
    index.__dict__["faiss"] = graph
    # Graphs that a CPU builds have rows of fewer links.
    with pytest.raises(NotOnGpu, match="with all of its links, as CAGRA builds it"):
        index.to("cuda")
    # Behind the links of the base level there are those of upper levels, whose absence does not matter.
    links = faiss.rev_swig_ptr(graph.hnsw.neighbors.data(), graph.hnsw.neighbors.size())
    firsts = faiss.rev_swig_ptr(graph.hnsw.offsets.data(), graph.hnsw.offsets.size())
    links[:] = -1
    for row in range(400):
        links[int(firsts[row]) : int(firsts[row]) + 8] = np.arange(8)
    assert len(links) > 400 * 8 and index.to("cuda").device == "cuda:0"


def test_a_graph_of_cagra_is_not_divided(make_index, gpus: Gpus, monkeypatch) -> None:
    monkeypatch.setattr(faiss, "GpuIndexCagra", object, raising=False)
    index = make_index("Flat")
    graph = faiss.IndexHNSWCagra(16, 4, faiss.METRIC_INNER_PRODUCT)
    graph.base_level_only = True
    index.__dict__["faiss"] = graph
    gpus.free = [2**40, 2**40]
    with pytest.raises(NotOnGpu, match="is searched on one GPU"):
        index.to("cuda", spread="replicas")
    assert index.to("cuda").device == "cuda:0"


def test_without_gpu_support_the_message_names_the_command(make_index) -> None:
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPU support")
    with pytest.raises(InputError, match="no GPU support: pip uninstall -y faiss-cpu && pip install faiss-gpu-cuvs"):
        make_index("Flat").to("cuda")


def test_a_gpu_that_does_not_exist_is_refused(make_index, gpus: Gpus) -> None:
    index = make_index("Flat")
    with pytest.raises(NotOnGpu, match="expected a GPU from cuda:0 to cuda:0, found cuda:3"):
        index.to("cuda:3")
    gpus.free = []
    with pytest.raises(NotOnGpu, match="faiss found no GPU"):
        index.to("cuda")


def test_memory_is_checked_before_the_copy(make_index, gpus: Gpus) -> None:
    index = make_index("Flat")
    gpus.free = [bytes_on_gpu(index.faiss) + WORKSPACE_BYTES - 1]
    with pytest.raises(NotOnGpu, match=r"expected 2,048 MiB of free memory \(2,048 of them .* on cuda:0, found 2,048"):
        index.to("cuda")
    assert gpus.copies == []
    gpus.free[0] += 1
    assert index.to("cuda").device == "cuda:0"


@pytest.mark.parametrize(
    ("spread", "free", "expected"),
    [
        ("auto", [1.0, 1.0], ([0], False)),
        ("auto", [0.6, 0.6], ([0, 1], True)),
        ("shards", [1.0, 1.0], ([0, 1], True)),
        ("replicas", [1.0, 1.0], ([0, 1], False)),
        ("replicas", [1.0, 0.6], None),
        ("auto", [0.6, 0.4], None),
    ],
)
def test_several_gpus_share_an_index_or_each_have_a_copy(make_index, gpus: Gpus, spread, free, expected) -> None:
    index = make_index("Flat")
    gpus.free = [int(share * bytes_on_gpu(index.faiss)) + WORKSPACE_BYTES for share in free]
    if expected is None:
        with pytest.raises(NotOnGpu, match="of free memory"):
            index.to("cuda", spread=spread)
    else:
        index.to("cuda", spread=spread)
    assert gpus.copies == ([] if expected is None else [expected])


def test_more_results_than_gpus_select_come_from_the_cpu(make_index, rng, gpus: Gpus) -> None:
    index = make_index("Flat", 2100)
    queries = rng.standard_normal((3, 16)).astype(np.float32)
    expected = index.search_rows(queries, MAX_RESULTS + 1)
    said: list[str] = []
    index.to("cuda", note=said.append)
    for _ in range(2):
        found = index.search_rows(queries, MAX_RESULTS + 1)
        np.testing.assert_array_equal(found[1], expected[1])
    assert said[1:] == [f"{index.folder}: searches for more than 2,048 results run on the CPU"]


def test_refinement_counts_its_candidates(make_index, gpus: Gpus) -> None:
    index = make_index("IVF8,SQ8,RFlat").to("cuda")
    assert index._gpu is not None and index._gpu.max_results == MAX_RESULTS // 4


def test_more_lists_than_gpus_visit_are_refused(make_index, gpus: Gpus) -> None:
    index = make_index("IVF8,Flat")
    index.faiss.nprobe = MAX_RESULTS + 1
    with pytest.raises(NotOnGpu, match="at most 2,048 lists per query, expected nprobe 2049"):
        index.to("cuda")


def test_filtered_searches_run_on_the_cpu_and_say_so_once(tmp_path: Path, rng, gpus: Gpus) -> None:
    header = {"dim": 8, "dtype": "float32", "model": {"sha256": "ab"}, "source": {}}
    vectors = rng.standard_normal((50, 8)).astype(np.float32)
    with EmbeddingWriter(tmp_path / "emb", **header) as writer:
        writer.append([Passage(f"d{row}", "", "text", {"even": row % 2 == 0}) for row in range(50)], vectors)
    build(EmbeddingStore.open(tmp_path / "emb"), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    expected = index.search(vectors[:3], 5, filter={"even": True})[1].tolist()
    said: list[str] = []
    index.to("cuda", note=said.append)
    for _ in range(2):
        assert index.search(vectors[:3], 5, filter={"even": True})[1].tolist() == expected
    assert said[1:] == [f"{index.folder}: searches with a filter run on the CPU"]


def test_several_indexes_move_together(tmp_path: Path, make_store: Callable, rng, gpus: Gpus) -> None:
    vectors = rng.standard_normal((60, 8)).astype(np.float32)
    for name, rows in {"a": slice(0, 30), "b": slice(30, 60)}.items():
        ids = [f"d{row}" for row in range(60)][rows]
        build(make_store(vectors[rows], ids, name=f"emb-{name}"), tmp_path / name)
    both = MultiIndex.open([tmp_path / "a", tmp_path / "b"])
    expected = both.search_rows(vectors[:4], 7)[1]
    assert both.to("cuda").device == "cuda:0" and len(gpus.copies) == 2
    np.testing.assert_array_equal(both.search_rows(vectors[:4], 7)[1], expected)


def test_tuning_on_a_gpu_chooses_the_setting_of_the_cpu(tmp_path: Path, make_store: Callable, rng, gpus: Gpus) -> None:
    store = make_store(rng.standard_normal((700, 16)).astype(np.float32), shard_rows=300)
    build(store, tmp_path / "index", factory="IVF8,Flat")
    target = Target(0.9, 5, None, 60)
    on_cpu = retune(tmp_path / "index", store, target)
    on_gpu = retune(tmp_path / "index", store, target, device="cuda")
    assert on_gpu.chosen.settings == on_cpu.chosen.settings and on_gpu.chosen.recall == on_cpu.chosen.recall
    assert on_gpu.device == "cuda:0" and on_gpu.line().endswith("µs a query on cuda:0")
    assert Index.open(tmp_path / "index").faiss.nprobe == on_cpu.chosen.settings.nprobe
    tuned = Index.open(tmp_path / "index").manifest.field("tuning", dict)
    assert tuned["device"] == "cuda:0" and "core_microseconds" not in tuned["chosen"]
    gpus.free = [0]
    notes: list[str] = []
    assert retune(tmp_path / "index", store, target, device="auto", note=notes.append).device == "cpu"
    assert notes[0].startswith("factory: recall is measured on the CPU: expected")
    with pytest.raises(NotOnGpu):
        retune(tmp_path / "index", store, target, device="cuda")


def test_a_graph_of_cagra_is_refused_where_it_cannot_be_built(tmp_path: Path, make_store: Callable, rng) -> None:
    if hasattr(faiss, "GpuIndexCagra"):
        pytest.skip("this faiss has cuVS")
    store = make_store(rng.standard_normal((70, 16)))
    with pytest.raises(InputError, match=r"factory 'CAGRA8': expected a faiss with cuVS .* without cuVS; HNSW32 is a"):
        build(store, tmp_path / "index", Plan("CAGRA8"))
    with pytest.raises(InputError, match="an even number of links from 8 to 256, such as CAGRA64"):
        make("CAGRA9", 16)
    assert not (tmp_path / "index").exists()
