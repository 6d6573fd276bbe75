"""A recall target holds for other queries than those it was measured with, at the lowest cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from index_helpers import listing

from index.ann.build import Plan, build
from index.ann.edit import add_passages, delete_passages, retune
from index.ann.index import Index
from index.ann.merge import merge
from index.ann.settings import Settings, core
from index.ann.train import sample_rows
from index.ann.tuning.measure import measure
from index.ann.tuning.recall import Target, Truth, find_truth, recall_of_each
from index.ann.tuning.tune import tune
from index.files import InputError
from index.manifest import entries, read_manifest, write_manifest
from index.store.reader import EmbeddingStore
from index.verify import verify

DIM = 32


def spread(rows: int, seed: int) -> np.ndarray:
    """Unit vectors around 200 centers; neighboring clusters overlap."""
    centers = np.random.default_rng(0).standard_normal((200, DIM))
    rng = np.random.default_rng(seed)
    vectors = centers[rng.integers(200, size=rows)] + 0.9 * rng.standard_normal((rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def store(make_store: Callable):
    return make_store(spread(8000, seed=1), shard_rows=3000)


NONE = np.empty(0, np.int64)


@pytest.mark.parametrize("factory", ["IVF64,Flat", "HNSW16", "IVF64,PQ16x4fs,RFlat", "PQ16x4fs,Refine(SQ8)", "Flat"])
def test_the_target_holds_for_other_queries(tmp_path: Path, store, factory: str) -> None:
    target = Target(0.9, 10, spread(1500, seed=2))
    tuning = build(store, tmp_path / "index", Plan(factory, target=target))
    assert tuning is not None and tuning.met and tuning.chosen.at_least >= 0.9
    truth = find_truth(store, Target(0.9, 10, spread(1500, seed=3)), NONE)
    found = Index.open(tmp_path / "index").search_rows(truth.queries, 10)[1]
    assert recall_of_each(found, truth).mean() >= 0.89


@pytest.mark.parametrize(("factory", "name"), [("IVF64,Flat", "nprobe"), ("HNSW16", "ef_search")])
def test_the_chosen_setting_is_the_smallest_that_reaches_the_target(store, factory: str, name: str) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(store.vectors())
    index.add(store.vectors())
    target = Target(0.9, 10, spread(1000, seed=2))
    truth = find_truth(store, target, NONE)
    chosen = tune(index, truth, target).chosen
    value = chosen.settings.known()[name]
    assert Settings.of(index) == chosen.settings
    assert measure(index, truth, Settings(**{name: int(value * 0.97) - 1})).at_least < 0.9


def test_the_chosen_pair_is_nearly_the_cheapest_of_a_fine_grid(store) -> None:
    """Cost is counted in codes compared and candidates re-scored, independent of machine load."""
    index = faiss.index_factory(DIM, "IVF64,PQ8np,RFlat", faiss.METRIC_INNER_PRODUCT)
    index.train(store.vectors())
    index.add(store.vectors())
    target = Target(0.9, 10, spread(1000, seed=2))
    truth = find_truth(store, target, NONE)
    tuning = tune(index, truth, target)
    pairs = [point for point in tuning.curve if point.at_least >= 0.9]
    # The Pareto frontier: fewer lists need a larger k_factor, and vice versa.
    chosen = tuning.chosen.settings
    for point in pairs:
        lists, again = point.settings.nprobe, point.settings.k_factor
        assert lists > 0.95 * chosen.nprobe or again > chosen.k_factor
    for nprobe in range(2, chosen.nprobe, 3):
        assert measure(index, truth, Settings(nprobe=nprobe, k_factor=chosen.k_factor)).at_least < 0.905


def test_an_unreachable_target_is_reported(tmp_path: Path, store) -> None:
    tuning = build(store, tmp_path / "index", Plan("IVF64,PQ4x4fs", target=Target(0.95)))
    assert tuning is not None and not tuning.met
    assert "NOT met" in tuning.line() and "\n" not in tuning.line()
    kept = read_manifest(tmp_path / "index").field("tuning", dict)
    assert kept["met"] is False and kept["chosen"]["recall"] == max(point["recall"] for point in kept["curve"])


def test_the_curve_is_stored_with_the_index(tmp_path: Path, store) -> None:
    out = tmp_path / "index"
    tuning = build(store, out, Plan("IVF64,SQ8", target=Target(0.9, 5)))
    assert tuning is not None
    kept = read_manifest(out).field("tuning", dict)
    assert (kept["target_recall"], kept["k"], kept["queries"], kept["rows"]) == (0.9, 5, 2000, 8000)
    assert kept["index_bytes"] == (out / "index.faiss").stat().st_size
    assert kept["chosen"] in kept["curve"] and len(kept["curve"]) >= 5
    times = [point["microseconds"] for point in kept["curve"]]
    assert times == sorted(times)
    assert (out / "recall.png").read_bytes()[:4] == b"\x89PNG"
    assert verify(out).files == 5
    assert core(faiss.read_index(str(out / "index.faiss"))).nprobe == kept["chosen"]["nprobe"]


def test_a_passage_is_not_its_own_neighbor(store) -> None:
    target = Target(0.9, 3)
    held_out = target.held_out_rows(store.rows, 0)
    truth = find_truth(store, target, held_out)
    assert truth.own is not None
    assert not (truth.rows == truth.own[:, None]).any()
    vectors = store.vectors()
    products = vectors[held_out] @ vectors.T
    products[np.arange(len(held_out)), held_out] = -np.inf
    assert (truth.rows[:, 0] == products.argmax(axis=1)).mean() > 0.999
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors)
    assert measure(flat, truth, Settings()).recall == 1


def test_held_out_rows_are_not_trained_on() -> None:
    barred = Target(0.9, 10).held_out_rows(10_000, seed=3)
    assert len(np.unique(barred)) == 2000
    for count in (10, 5000, 8000):
        rows = sample_rows(10_000, count, 3, barred)
        assert len(np.unique(rows)) == count and not np.isin(rows, barred).any()


def test_ties_at_rank_k_count_as_correct() -> None:
    truth = Truth(np.zeros((2, 1), np.float32), None, np.array([[1, 2, 3, 4], [5, 6, -1, -1]]), 2)
    assert recall_of_each(np.array([[4, 2], [5, -1]]), truth).tolist() == [1.0, 0.5]
    assert recall_of_each(np.array([[-1, -1], [9, 6]]), truth).tolist() == [0.0, 0.5]


def test_equal_vectors_are_listed_as_ties(make_store: Callable) -> None:
    vectors = np.repeat(spread(50, 1), 3, axis=0)
    truth = find_truth(make_store(vectors), Target(0.9, 1, spread(40, 2)), NONE)
    assert ((truth.rows >= 0).sum(axis=1) == 3).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recall": 0.0}, "target_recall: expected more than 0"),
        ({"recall": 1.5}, "target_recall: expected more than 0 and at most 1, found 1.5"),
        ({"k": 0}, "k: expected at least 1"),
        ({"queries": np.ones((29, DIM), np.float32)}, "queries: expected at least 30 to measure with, found 29"),
    ],
)
def test_invalid_targets_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Target(**{"recall": 0.9, **change})


def test_queries_of_another_dimension_are_refused(tmp_path: Path, store) -> None:
    plan = Plan("Flat", target=Target(0.9, 10, np.ones((30, DIM + 1), np.float32)))
    with pytest.raises(InputError, match=f"expected vectors of {DIM} dimensions, found {DIM + 1}"):
        build(store, tmp_path / "index", plan)


def test_too_few_passages_for_tuning_are_refused(tmp_path: Path, make_store: Callable) -> None:
    with pytest.raises(InputError, match=r"expected at least 60 passages to measure with 30, .* found 20"):
        build(make_store(spread(20, 1)), tmp_path / "index", Plan("Flat", target=Target(0.9)))


@pytest.mark.parametrize("factory", ["HNSW16", "HNSW16_SQ8,RFlat"])
def test_a_graph_is_tuned_with_held_out_passages(tmp_path: Path, store, factory: str) -> None:
    tuning = build(store, tmp_path / "index", Plan(factory, target=Target(0.9, 10)))
    assert tuning is not None and tuning.met and tuning.queries == 2000
    index = Index.open(tmp_path / "index")
    truth = find_truth(store, Target(0.9, 10, spread(1500, seed=3)), NONE)
    assert recall_of_each(index.search_rows(truth.queries, 10)[1], truth).mean() >= 0.89
    # Every passage is in the index, under its own row.
    Settings(ef_search=200, k_factor=4.0).apply(index.faiss)
    assert (index.search_rows(store.vectors(), 1)[1][:, 0] == np.arange(store.rows)).mean() > 0.999
    assert index.ids[:3] == store.ids()[:3] and index.faiss.ntotal == store.rows


def test_retuning_a_graph_requires_queries(tmp_path: Path, store) -> None:
    build(store, tmp_path / "index", Plan("HNSW8"))
    with pytest.raises(InputError, match="expected queries to measure the recall of a graph"):
        retune(tmp_path / "index", store, Target(0.9))
    with pytest.raises(InputError, match="factory 'NSG8': expected queries to measure its recall"):
        build(store, tmp_path / "other", Plan("NSG8", target=Target(0.9)))


def test_retuning_with_other_passages_is_refused(tmp_path: Path, make_store: Callable) -> None:
    """Their number, dimension and model are the same, but recall would be meaningless."""
    vectors, ids = spread(2000, seed=1), [f"d{row}" for row in range(2000)]
    store = make_store(vectors, ids, shard_rows=1000)
    build(store, tmp_path / "part1", Plan("IVF16,SQ8", part=(1, 2), target=None))
    build(store, tmp_path / "part2", Plan(part=(2, 2), train_from=tmp_path / "part1"))
    merge([tmp_path / "part2", tmp_path / "part1"], tmp_path / "swapped")
    build(store, tmp_path / "changed", Plan("IVF16,SQ8"))
    delete_passages(tmp_path / "changed", ["d3", "d1999"])
    add_passages(tmp_path / "changed", make_store(spread(2, seed=2), ["n0", "n1"], name="new"))
    for name, found in (
        ("swapped", r"found no 'd0' of the same text behind 'd1999' \(row 1000 of the index\)"),
        ("changed", r"found no 'n0' of the same text behind 'd1998' \(row 1998 of the index\)"),
    ):
        old = listing(tmp_path / name)
        with pytest.raises(InputError, match=found) as caught:
            retune(tmp_path / name, store, Target(0.9))
        assert "\n" not in str(caught.value)
        assert listing(tmp_path / name) == old


def test_retuning_with_changed_texts_is_refused(tmp_path: Path, make_store: Callable) -> None:
    store = make_store(spread(100, seed=1))
    build(store, tmp_path / "index", Plan("IVF2,Flat"))
    passages = store.folder / "00000.jsonl"
    passages.write_bytes(passages.read_bytes().replace(b"text of d0", b"news of d0"))
    old = read_manifest(store.folder)
    write_manifest(replace(old, files=entries(store.folder, list(old.files))))
    with pytest.raises(InputError, match=r"found no 'd0' of the same text \(row 0 of the index\)"):
        retune(tmp_path / "index", EmbeddingStore.open(store.folder), Target(0.9))


@pytest.mark.parametrize("by_queries", [True, False])
def test_retuning_after_deletion_uses_the_original_store(
    tmp_path: Path, make_store: Callable, by_queries: bool
) -> None:
    vectors, ids = spread(3000, seed=1), [f"d{row}" for row in range(3000)]
    store, left = make_store(vectors, ids, shard_rows=700), [row for row in range(3000) if row % 3]
    kept = make_store(vectors[left], [ids[row] for row in left], name="kept", shard_rows=500)
    build(store, tmp_path / "index", Plan("IVF64,SQ8"))
    delete_passages(tmp_path / "index", ids[::3])
    target = Target(0.9, 10, spread(500, seed=2) if by_queries else None)
    ours, theirs = (retune(tmp_path / "index", each, target) for each in (store, kept))
    assert ours.met and ours.chosen.settings == theirs.chosen.settings
    recalls = [{point.settings: point.recall for point in tuning.curve} for tuning in (ours, theirs)]
    assert recalls[0] == recalls[1]


@pytest.mark.parametrize("recall", [0.5, 0.9, 0.99, 1.0])
def test_ivf_flat_reaches_any_recall(make_store: Callable, rng, recall: float) -> None:
    """Without clusters a few lists have low recall, and at first each doubling gains more than the one before."""
    vectors = rng.standard_normal((7000, 48)).astype(np.float32)
    index = faiss.index_factory(48, "IVF512,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:6500])
    index.add(vectors[:6500])
    target = Target(recall, 10, vectors[6500:])
    tuning = tune(index, find_truth(make_store(vectors[:6500], shard_rows=7000), target, NONE), target)
    assert tuning.met, tuning.line()


def test_a_centroid_graph_finds_the_nearest_lists(rng) -> None:
    """With faiss's default efSearch of 16 it misses many of the nearest lists."""
    vectors = rng.standard_normal((20_000, 32)).astype(np.float32)
    index = faiss.index_factory(32, "IVF512_HNSW8,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    ivf = core(index)
    graph = faiss.downcast_index(ivf.quantizer)
    centroids = faiss.rev_swig_ptr(faiss.downcast_index(graph.storage).get_xb(), 512 * 32).reshape(512, 32)
    nearest = np.argsort(-(vectors[:200] @ centroids.T), axis=1)[:, :200]

    def share() -> float:
        found = graph.search(vectors[:200], 200)[1]
        return float(np.mean([len({*ours} & {*theirs}) / 200 for ours, theirs in zip(found, nearest, strict=True)]))

    before = share()
    Settings(nprobe=200).apply(index)
    assert share() > max(0.98, before + 0.05)
