"""Indexes that are built in parts, merged, extended or reduced equal those of a single build."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from index_helpers import MODEL, flipped_bytes, listing, pairs_of, passages_of

from index.ann import edit
from index.ann.build import Plan, build
from index.ann.edit import add_passages, delete_passages, retune
from index.ann.index import Index
from index.ann.merge import merge
from index.ann.multi_index import MultiIndex
from index.ann.tuning.recall import Target
from index.files import InputError
from index.store.ids import duplicate_id
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from index.verify import verify

CAN_CHANGE = ["Flat", "SQfp16", "SQ8", "PQ8x4fs", "IVF8,Flat", "IVF8,SQ8", "OPQ8,IVF8,PQ8x4fs,RFlat", "PCA8,SQ8"]


@pytest.fixture
def vectors(rng: np.random.Generator) -> np.ndarray:
    made = rng.standard_normal((600, 16)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture
def queries(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((8, 16)).astype(np.float32)


@pytest.fixture
def store(make_store: Callable, vectors: np.ndarray) -> EmbeddingStore:
    return make_store(vectors, shard_rows=100)


def build_parts(store: EmbeddingStore, folder: Path, factory: str, count: int = 3) -> list[Path]:
    parts = [folder / f"part{number}" for number in range(1, count + 1)]
    build(store, parts[0], Plan(factory, part=(1, count)))
    for number, part in enumerate(parts[1:], start=2):
        build(store, part, Plan(part=(number, count), train_from=parts[0]))
    return parts


def assert_alike(ours: Path, theirs: Path, queries: np.ndarray) -> None:
    """Equal bytes except for the manifest; unused bytes of fast-scan blocks may differ."""
    assert verify(ours).rows == verify(theirs).rows
    expected, found = listing(theirs), listing(ours)
    for name in set(expected) - {"manifest.json", "index.faiss"}:
        assert found[name] == expected[name], name
    if b"4fs" in expected["manifest.json"]:
        np.testing.assert_array_equal(
            Index.open(ours).search_rows(queries, 50), Index.open(theirs).search_rows(queries, 50)
        )
    else:
        assert found["index.faiss"] == expected["index.faiss"]


@pytest.mark.parametrize("factory", CAN_CHANGE)
def test_merged_parts_are_byte_identical_to_one_build(
    tmp_path: Path, store: EmbeddingStore, queries: np.ndarray, factory: str
) -> None:
    build(store, tmp_path / "whole", factory=factory)
    parts = build_parts(store, tmp_path, factory, 4)
    assert [Index.open(part).rows for part in parts] == [100, 200, 100, 200]
    assert merge(parts, tmp_path / "merged") == 600
    assert_alike(tmp_path / "merged", tmp_path / "whole", queries)


@pytest.mark.parametrize("factory", CAN_CHANGE)
def test_an_extended_index_is_byte_identical_to_one_build(
    tmp_path: Path, make_store: Callable, vectors: np.ndarray, queries: np.ndarray, factory: str
) -> None:
    ids = [f"d{row}" for row in range(600)]
    whole = make_store(vectors, ids, name="whole", shard_rows=100)
    first, rest = (
        make_store(vectors[:500], ids[:500], name="first", shard_rows=100),
        make_store(vectors[500:], ids[500:], name="rest", shard_rows=30),
    )
    build(first, tmp_path / "index", factory=factory)
    build(whole, tmp_path / "expected", Plan(train_from=tmp_path / "index"))
    assert add_passages(tmp_path / "index", rest) == 100
    assert_alike(tmp_path / "index", tmp_path / "expected", queries)
    again = listing(tmp_path / "index")
    assert add_passages(tmp_path / "index", rest) == 0, "added already: run again after a kill it does nothing"
    assert listing(tmp_path / "index") == again


@pytest.mark.parametrize("factory", CAN_CHANGE)
def test_deletion_keeps_the_results_of_other_passages(
    tmp_path: Path, store: EmbeddingStore, vectors: np.ndarray, queries: np.ndarray, factory: str
) -> None:
    build(store, tmp_path / "index", factory=factory)
    before = Index.open(tmp_path / "index")
    expected = [[pair for pair in pairs if int(pair[0][1:]) % 3] for pairs in pairs_of(before.search(queries, 600))]
    gone = [f"d{row}" for row in range(0, 600, 3)]
    assert delete_passages(tmp_path / "index", [*gone, "unknown"]) == 200
    after = Index.open(tmp_path / "index", verify="hash")
    assert after.rows == 400 and list(after.ids) == [f"d{row}" for row in range(600) if row % 3]
    assert after.passage(0) == passages_of(["d1"])[0] and after.passage(399) == passages_of(["d599"])[0]
    for ours, theirs in zip(pairs_of(after.search(queries, 400)), expected, strict=True):
        # Rounding differs with the number of products, and between fast-scan tables.
        assert {id_ for id_, _ in ours} == {id_ for id_, _ in theirs}
        np.testing.assert_allclose([s for _, s in ours], [s for _, s in theirs], rtol=1e-4, atol=1e-5)
    assert delete_passages(tmp_path / "index", gone) == 0
    with pytest.raises(InputError, match="all 400 would be deleted"):
        delete_passages(tmp_path / "index", after.ids)


@pytest.mark.parametrize("factory", ["HNSW8", "HNSW8_SQ8"])
def test_unsupported_delete_and_merge_name_supported_types(tmp_path: Path, store: EmbeddingStore, factory: str) -> None:
    build(store, tmp_path / "index", factory=factory)
    old = listing(tmp_path / "index")
    with pytest.raises(InputError, match=r"cannot delete; Flat, SQ…, PQ… and IVF… can") as caught:
        delete_passages(tmp_path / "index", ["d1"])
    assert "\n" not in str(caught.value)
    assert listing(tmp_path / "index") == old
    parts = build_parts(store, tmp_path, factory, 2)
    with pytest.raises(InputError, match=r"cannot be merged .* Flat, SQ…, PQ… and IVF… can"):
        merge(parts, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("factory", ["IVF8,SQ8", "PCA8,IVF8,Flat", "IVF8,PQ4np"])
def test_lists_on_disk_give_the_results_of_lists_in_memory(
    tmp_path: Path, store: EmbeddingStore, queries: np.ndarray, factory: str, count: int
) -> None:
    """Merged from parts of different sizes, and filled in groups of different sizes."""
    build(store, tmp_path / "whole", factory=factory)
    expected = Index.open(tmp_path / "whole").search_rows(queries, 20)
    parts = build_parts(store, tmp_path, factory, count)
    merge(parts, tmp_path / "merged", on_disk=True)
    build(store, tmp_path / "filled", Plan(factory, on_disk=True, memory_mib=0.0009 * count))
    for name in ("merged", "filled"):
        index = Index.open(tmp_path / name, verify="hash")
        assert "lists.ivfdata" in index.manifest.files
        for ours, theirs in zip(index.search_rows(queries, 20), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        plain = faiss.read_index(str(tmp_path / name / "index.faiss"))
        np.testing.assert_array_equal(plain.search(queries, 20)[1], expected[1])
    assert listing(tmp_path / "merged")["lists.ivfdata"] == listing(tmp_path / "filled")["lists.ivfdata"]
    os.rename(tmp_path / "merged", tmp_path / "moved")
    np.testing.assert_array_equal(Index.open(tmp_path / "moved").search_rows(queries, 20)[1], expected[1])


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "PCA8,IVF8,Flat", "IVF8_HNSW8,PQ4np"])
@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_new_passages_are_merged_into_lists_on_disk(
    tmp_path: Path, store: EmbeddingStore, queries: np.ndarray, factory: str, first: bool, second: bool
) -> None:
    """The second index is trained from the first and merged with it into the first's folder, which is replaced."""
    build(store, tmp_path / "whole", factory=factory)
    build(store, tmp_path / "index", Plan(factory, part=(1, 3), on_disk=first))
    build(store, tmp_path / "new", Plan(part=(2, 3), train_from=tmp_path / "index", on_disk=second))
    build(store, tmp_path / "newer", Plan(part=(3, 3), train_from=tmp_path / "new"))
    for new, rows in (("new", 400), ("newer", 600)):
        assert merge([tmp_path / "index", tmp_path / new], tmp_path / "index", on_disk=True) == rows
    assert verify(tmp_path / "index").rows == 600
    ours, theirs = Index.open(tmp_path / "index"), Index.open(tmp_path / "whole")
    assert list(ours.ids) == list(theirs.ids)
    np.testing.assert_array_equal(ours.search_rows(queries, 50), theirs.search_rows(queries, 50))


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "PCA8,IVF8,Flat", "IVF8_HNSW8,PQ4np"])
def test_lists_on_disk_give_the_same_results_with_mmap(
    tmp_path: Path, store: EmbeddingStore, queries: np.ndarray, factory: str
) -> None:
    build(store, tmp_path / "index", Plan(factory, on_disk=True))
    mapped, read = (Index.open(tmp_path / "index", mmap=mmap).search_rows(queries, 20) for mmap in (True, False))
    np.testing.assert_array_equal(mapped, read)


@pytest.mark.parametrize("factory", ["Flat", "PQ8x4fs", "IVF8,PQ8x4fs,RFlat", "HNSW8"])
def test_lists_on_disk_are_refused_for_unsupported_types(tmp_path: Path, store: EmbeddingStore, factory: str) -> None:
    with pytest.raises(InputError, match=r"--on-disk: expected IVF…,Flat"):
        build(store, tmp_path / "index", Plan(factory, on_disk=True))
    assert os.listdir(tmp_path) == ["emb"]


def test_lists_on_disk_are_not_changed_in_place(tmp_path: Path, store: EmbeddingStore) -> None:
    build(store, tmp_path / "index", Plan("IVF8,SQ8", on_disk=True))
    for change, instead in (
        (lambda: add_passages(tmp_path / "index", store), "of the new passages and merge the two, with --train-from"),
        (lambda: delete_passages(tmp_path / "index", ["d1"]), "of the passages that are to stay, with --train-from"),
    ):
        with pytest.raises(InputError, match=f"found lists on disk; build an index {instead}"):
            change()
    tuning = retune(tmp_path / "index", store, Target(0.9, 5))
    assert tuning.met and verify(tmp_path / "index").rows == 600


@pytest.mark.parametrize("factory", [*CAN_CHANGE, "HNSW8", "IVF8,PQ4np"])
def test_a_memory_mapped_index_gives_the_same_results(
    tmp_path: Path, store: EmbeddingStore, queries: np.ndarray, factory: str
) -> None:
    build(store, tmp_path / "index", factory=factory)
    mapped, read = (Index.open(tmp_path / "index", mmap=mmap).search_rows(queries, 20) for mmap in (True, False))
    np.testing.assert_array_equal(mapped[1], read[1])
    np.testing.assert_array_equal(mapped[0], read[0])


@pytest.mark.parametrize("k", [1, 7, 40, 700])
def test_multi_index_of_flat_indexes_equals_one_index(
    tmp_path: Path, make_store: Callable, rng: np.random.Generator, k: int
) -> None:
    store = make_store(rng.integers(0, 3, (600, 3)), [f"d{n}" for n in rng.permutation(600)], shard_rows=100)
    build(store, tmp_path / "whole")
    parts = build_parts(store, tmp_path, "Flat")
    one, multi = Index.open(tmp_path / "whole"), MultiIndex.open(parts)
    some = rng.integers(-1, 3, (20, 3)).astype(np.float32)
    for ours, theirs in zip(multi.search_rows(some, k), one.search_rows(some, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert pairs_of(multi.search(some, k)) == pairs_of(one.search(some, k))
    assert (multi.rows, multi.dim, list(multi.ids)) == (600, 3, list(one.ids))
    assert [multi.passage(row) for row in (0, 199, 200, 599)] == [one.passage(row) for row in (0, 199, 200, 599)]
    with pytest.raises(IndexError):
        multi.passage(600)
    with pytest.raises(InputError, match=r"expected other passages than those of .*, found the same"):
        MultiIndex.open([*parts, parts[1]])


@pytest.mark.parametrize("k", [1, 7, 40, 700])
def test_multi_index_returns_shared_passages_once(
    tmp_path: Path, make_store: Callable, rng: np.random.Generator, k: int
) -> None:
    store = make_store(rng.integers(0, 3, (600, 3)), [f"d{n}" for n in rng.permutation(600)], shard_rows=100)
    build(store, tmp_path / "whole")
    parts = build_parts(store, tmp_path, "Flat")
    delete_passages(tmp_path / "whole", [f"d{n}" for n in range(50)], tmp_path / "fewer")
    one = Index.open(tmp_path / "whole")
    some = rng.integers(-1, 3, (20, 3)).astype(np.float32)
    for others in ([parts[1]], [tmp_path / "fewer"], [*parts, tmp_path / "fewer"]):
        multi = MultiIndex.open([tmp_path / "whole", *others])
        assert pairs_of(multi.search(some, k)) == pairs_of(one.search(some, k))
        scores, rows = multi.search_rows(some, k)
        assert scores.shape == rows.shape == (20, k)
        assert ((rows >= 0).sum(axis=1) == min(k, 600)).all() and (scores[rows < 0] == -np.inf).all()


def test_incompatible_indexes_are_not_merged(tmp_path: Path, make_store: Callable, vectors: np.ndarray) -> None:
    def made(name: str, rows: slice, factory: str = "IVF8,Flat", seed: int = 0) -> Path:
        ids = [f"d{row}" for row in range(600)][rows]
        build(make_store(vectors[rows], ids, name=f"{name}-emb"), tmp_path / name, factory=factory, seed=seed)
        return tmp_path / name

    first = made("first", slice(0, 300))
    for other, message in (
        (made("kind", slice(300, 600), "SQ8"), r"expected the factory of .* \(IVF8,Flat\), found SQ8"),
        (made("trained", slice(300, 600), seed=1), r"expected the trained of .*; build it with --train-from"),
    ):
        with pytest.raises(InputError, match=message):
            merge([first, other], tmp_path / "out")
    with pytest.raises(InputError, match=r"expected every id in one index alone, found 'd\d+' twice"):
        merge([first, first], tmp_path / "out")
    with pytest.raises(InputError, match="expected two indexes or more, found 1"):
        merge([first], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vectors_of_another_model_are_not_added(tmp_path: Path, store: EmbeddingStore, vectors: np.ndarray) -> None:
    build(store, tmp_path / "index")
    with EmbeddingWriter(tmp_path / "other", dim=16, model={"sha256": "cd"}, source={}) as writer:
        writer.append(passages_of(["new"]), vectors[:1])
    other = EmbeddingStore.open(tmp_path / "other")
    with pytest.raises(InputError, match="expected queries of the model that embedded its passages"):
        add_passages(tmp_path / "index", other)
    with pytest.raises(InputError, match="expected queries of the model"):
        build(other, tmp_path / "more", Plan(train_from=tmp_path / "index"))


def test_existing_ids_are_not_added_again(tmp_path: Path, make_store: Callable, vectors: np.ndarray) -> None:
    build(make_store(vectors[:300]), tmp_path / "index")
    more = make_store(vectors[300:302], ["new", "d7"], name="more")
    with pytest.raises(InputError, match=r"expected ids that are not yet in .*index, found 'd7'"):
        add_passages(tmp_path / "index", more)


def test_a_store_of_other_texts_is_not_taken_for_one_that_was_added(
    tmp_path: Path, make_store: Callable, vectors: np.ndarray
) -> None:
    store = make_store(vectors[:50])
    build(store, tmp_path / "index")
    assert add_passages(tmp_path / "index", store) == 0
    with EmbeddingWriter(tmp_path / "other", dim=16, dtype="float32", model=MODEL, source={}, shard_rows=7) as writer:
        writer.append([replace(passage, text="another") for passage in store.passages()], vectors[:50])
    with pytest.raises(InputError, match=r"expected ids that are not yet in .*index, found 'd0'"):
        add_passages(tmp_path / "index", EmbeddingStore.open(tmp_path / "other"))


def test_a_duplicate_id_is_found_among_many(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_text("".join(f"x{n}\n" for n in range(5000)))
    files[1].write_text("".join(f"y{n}\n" for n in range(5000)))
    assert duplicate_id(files) is None
    files[1].write_text(files[1].read_text() + "x4321\n")
    assert duplicate_id(files) == "x4321"


def test_more_parts_than_shards_are_refused(tmp_path: Path, store: EmbeddingStore) -> None:
    with pytest.raises(InputError, match="expected at most 6 parts, as many as it has shards, found 7"):
        build(store, tmp_path / "index", Plan("Flat", part=(1, 7)))
    with pytest.raises(InputError, match="part 3/2: expected a number from 1 to 2"):
        build(store, tmp_path / "index", Plan("Flat", part=(3, 2)))


def test_any_flipped_byte_of_a_tuned_on_disk_index_is_detected(
    tmp_path: Path, store: EmbeddingStore, rng: np.random.Generator
) -> None:
    out = tmp_path / "index"
    build(store, out, Plan("IVF8,SQ8", on_disk=True, target=Target(0.9, 5)))
    assert {"lists.ivfdata", "recall.png"} < set(os.listdir(out))
    for name in flipped_bytes(out, rng, places=8):
        with pytest.raises(InputError, match=f"{name}: "):
            verify(out)
    assert verify(out).files == 6


@pytest.mark.parametrize("before_exchange", [True, False])
def test_edits_first_recover_an_interrupted_replacement(
    tmp_path: Path, make_store: Callable, vectors: np.ndarray, before_exchange: bool
) -> None:
    """Both states between the renames; repeating the command must work for either."""
    build(make_store(vectors[:300]), tmp_path / "index")
    more = make_store(vectors[300:], [f"n{row}" for row in range(300)], name="more")
    add_passages(tmp_path / "index", more, tmp_path / "new")
    (tmp_path / "index").rename(tmp_path / ".index.0123abcd.old")
    if not before_exchange:
        (tmp_path / "new").rename(tmp_path / "index")
    assert add_passages(tmp_path / "index", more) == (300 if before_exchange else 0)
    assert verify(tmp_path / "index").rows == 600
    assert not list(tmp_path.glob(".index.*"))


@pytest.mark.parametrize("first", ["add", "delete", "tune"])
@pytest.mark.parametrize("second", ["add", "delete", "build"])
def test_no_change_is_undone_by_one_that_runs_meanwhile(
    tmp_path: Path, make_store: Callable, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    store, place = make_store(vectors[:100]), tmp_path / "index"
    new = [make_store(vectors[n : n + 5], [f"n{n + i}" for i in range(5)], name=f"new{n}") for n in (100, 105)]
    build(store, place, factory="IVF4,Flat")
    changes = {
        "add": lambda number: add_passages(place, new[number]),
        "delete": lambda number: delete_passages(place, [store.ids()[number]]),
        "tune": lambda number: retune(place, store, Target(0.5, 3)),
        "build": lambda number: build(new[number], place, factory="Flat"),
    }
    refused, between, original = [], [], edit.write_faiss

    def write_while_another_changes(index: object, path: Path) -> str:
        monkeypatch.setattr(edit, "write_faiss", original)
        try:
            changes[second](1)
        except InputError as error:
            refused.append(str(error))
        between.append(listing(place))
        return original(index, path)

    monkeypatch.setattr(edit, "write_faiss", write_while_another_changes)
    if second == "build":
        with pytest.raises(InputError, match="another process has replaced this index meanwhile"):
            changes[first](0)
        assert listing(place) == between[0] and not refused
    else:
        changes[first](0)
        assert refused == [f"{place}: another process is writing here"]
    assert (
        Index.open(place).rows == {"build": 5, "add": 105, "delete": 99, "tune": 100}[second if not refused else first]
    )
    verify(place)
