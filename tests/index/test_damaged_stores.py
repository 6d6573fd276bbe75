"""Damaged embedding stores are refused, and the message names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from index_helpers import HEADER, MODEL, five_rows, flipped_bytes, listing

from index.files import InputError
from index.manifest import EMBEDDINGS, Manifest, read_manifest, write_manifest
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from index.verify import verify


def test_any_flipped_byte_is_detected_and_its_file_named(tmp_path: Path, make_store: Callable, rng) -> None:
    folder = make_store(rng.standard_normal((9, 3))).folder
    assert verify(folder).rows == 9
    for name in flipped_bytes(folder, rng):
        with pytest.raises(InputError, match=f"{name}: "):
            verify(folder)
    assert verify(folder).files == 6


@pytest.mark.parametrize("complete", [False, True])
def test_damaged_stores_are_not_resumed(tmp_path: Path, rng, complete: bool) -> None:
    folder = five_rows(tmp_path / "emb", complete)
    for name in flipped_bytes(folder, rng, places=3):
        with pytest.raises(InputError, match=f"{name}: "):
            EmbeddingWriter(folder, **HEADER)
    with EmbeddingWriter(folder, **HEADER) as writer:
        assert (writer.rows, writer.complete) == (5 if complete else 4, complete)


def test_truncated_or_missing_files_are_refused(tmp_path: Path, make_store: Callable, rng) -> None:
    store = make_store(rng.standard_normal((9, 3)))
    header = {"dim": 3, "model": MODEL, "source": {"file": "corpus.jsonl"}, "shard_rows": 7}
    for name, data in listing(store.folder).items():
        if name == "manifest.json":
            continue
        (store.folder / name).write_bytes(data[:-1])
        for reopen in (lambda: EmbeddingStore.open(store.folder), lambda: EmbeddingWriter(store.folder, **header)):
            with pytest.raises(InputError, match=f"{name}: damaged: expected {len(data)} bytes, found {len(data) - 1}"):
                reopen()
        (store.folder / name).unlink()
        with pytest.raises(InputError, match=f"{name}: missing"):
            EmbeddingStore.open(store.folder)
        (store.folder / name).write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 0},
        {"dim": "3"},
        {"dim": True},
        {"rows": -1},
        {"rows": 10**12},
        {"rows": 0},
        {"shard_rows": 0},
        {"dtype": "object"},
        {"dtype": 3},
        {"model": {"sha256": 3}},
        {"model": None},
        {"source": []},
        {"complete": 1},
    ],
    ids=str,
)
def test_a_forged_header_is_refused_in_one_line(make_store: Callable, rng, change: dict) -> None:
    folder = make_store(rng.standard_normal((9, 3))).folder
    old = read_manifest(folder)
    write_manifest(Manifest(folder, EMBEDDINGS, {**old.fields, **change}, old.files))
    with pytest.raises(InputError, match=r"manifest\.json: expected") as caught:
        EmbeddingStore.open(folder)
    assert "\n" not in str(caught.value)


def test_arrays_of_another_shape_or_dtype_are_refused(make_store: Callable, rng) -> None:
    folder = make_store(rng.standard_normal((9, 3))).folder
    old = read_manifest(folder)
    for change, found in (({"dim": 4}, r"expected float32 \(7, 4\)"), ({"dtype": "float16"}, "expected float16")):
        write_manifest(Manifest(folder, EMBEDDINGS, {**old.fields, **change}, old.files))
        with pytest.raises(InputError, match=rf"00000\.npy: {found}"):
            EmbeddingStore.open(folder).vectors()


def test_a_pickle_is_never_loaded(make_store: Callable, rng) -> None:
    folder = make_store(rng.standard_normal((3, 3))).folder
    evil = np.array([{"a": 1}], dtype=object)
    with open(folder / "00000.npy", "wb") as stream:
        np.save(stream, evil, allow_pickle=True)
    store = EmbeddingStore(read_manifest(folder))
    with pytest.raises(InputError, match=r"00000\.npy: expected an array in npy format"):
        store.vectors()


def test_opening_an_index_as_a_store_is_refused(tmp_path: Path) -> None:
    write_manifest(Manifest(tmp_path, "index", {}, {}))
    for reopen in (lambda: EmbeddingStore.open(tmp_path), lambda: EmbeddingWriter(tmp_path, **HEADER)):
        with pytest.raises(InputError, match="expected an embedding store, found an index"):
            reopen()


@pytest.mark.parametrize("change", [{"dim": 0}, {"shard_rows": 0}, {"dtype": "bfloat16"}], ids=str)
def test_impossible_headers_are_refused(tmp_path: Path, change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        EmbeddingWriter(tmp_path / "emb", **{**HEADER, **change})
