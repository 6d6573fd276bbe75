"""Stores of int8 and binary codes, and re-scored binary search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from index.ann.build import build
from index.ann.index import Index
from index.ann.rescoring import search_rescored
from index.files import InputError
from index.passages import Passage
from index.store.quantized import QuantizedStore
from index.store.reader import EmbeddingStore
from index.store.shards import dequantized, quantized
from index.store.writer import EmbeddingWriter

N, D = 300, 21


def unit_vectors(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(folder: Path, vectors: np.ndarray, dtype: str) -> EmbeddingStore:
    with EmbeddingWriter(folder, dim=D, model={"sha256": "m"}, source={}, dtype=dtype, shard_rows=100) as writer:  # type: ignore[arg-type]
        writer.append([Passage(f"d{row}", "", "t") for row in range(len(vectors))], vectors)
    return EmbeddingStore.open(folder, verify="hash")


@pytest.mark.parametrize("dtype, bytes_, error", [("int8", D, 0.01), ("binary", 3, 0.75)])
def test_codes_are_small_and_keep_the_direction(tmp_path: Path, dtype: str, bytes_: int, error: float) -> None:
    vectors = unit_vectors(N)
    store = write(tmp_path / dtype, vectors, dtype)
    found = np.concatenate([part for _, part in store.shards()])
    assert found.dtype == np.float32 and (store.vectors() == found).all() and (tmp_path / dtype / "00002.npy").exists()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    # float64 reference: the code of each value, divided by the length of all.
    wide = vectors.astype(np.float64)
    codes = np.rint(wide / np.abs(wide).max(1, keepdims=True) * 127) if dtype == "int8" else np.where(wide > 0, 1, -1)
    np.testing.assert_allclose(found, codes / np.linalg.norm(codes, axis=1, keepdims=True), atol=1e-6)
    assert 0 < np.abs(found - vectors).max() < error
    raw = np.concatenate([part for _, part in store.codes()])
    assert raw.nbytes == N * bytes_
    view = QuantizedStore(write(tmp_path / "full", vectors, "float32"), dtype)
    assert (np.concatenate([part for _, part in view.codes()]) == raw).all()
    assert (np.concatenate([part for _, part in view.shards()]) == found).all()
    build(store, tmp_path / "index", factory="Flat")
    scores, rows = Index.open(tmp_path / "index").search_rows(vectors[:5], 1)
    np.testing.assert_allclose(scores[:, 0], (vectors[:5] @ found.T).max(axis=1), rtol=1e-5)
    assert dtype == "binary" or rows[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_only_unit_vectors_are_quantized(tmp_path: Path) -> None:
    vectors = unit_vectors(4)
    for wrong, found in ((vectors * 2, "length 2"), (np.where(np.eye(4, D) > 0, np.nan, vectors), "length nan")):
        with pytest.raises(InputError, match=f"passage 'd0': expected a vector of unit length for int8, found {found}"):
            write(tmp_path / found, wrong, "int8")
    with pytest.raises(InputError, match="binary: expected vectors of unit length"):
        QuantizedStore(write(tmp_path / "long", vectors * 2, "float32"), "binary")
    with pytest.raises(InputError, match=r"expected codes \(int8 or binary\), found float32"):
        next(write(tmp_path / "float", vectors, "float32").codes())
    zeros = np.zeros((1, D), np.float32)
    assert not dequantized(quantized(zeros, "int8"), "int8", D).any()


def test_rescoring_ranks_the_nearest_codes_by_finer_vectors(tmp_path: Path) -> None:
    vectors, queries = unit_vectors(N), unit_vectors(6, 1)
    fine = write(tmp_path / "store", vectors, "int8")
    codes = quantized(vectors, "binary")
    decoded = fine.vectors().astype(np.float64)
    for factor in (1, 4, N):
        scores, rows = search_rescored(queries, codes, fine, 10, factor=factor)
        for query, (row, score) in enumerate(zip(rows, scores, strict=True)):
            np.testing.assert_allclose(score, decoded[row] @ queries[query], atol=1e-6)
            assert (np.diff(score) <= 0).all() and len(set(row.tolist())) == 10
            distances = (np.unpackbits(codes ^ quantized(queries[query : query + 1], "binary"), axis=1)).sum(1)
            assert distances[row].max() <= np.sort(distances)[min(N, factor * 10) - 1]
            if factor == N:
                assert row.tolist() == np.argsort(-(decoded @ queries[query]))[:10].tolist()
