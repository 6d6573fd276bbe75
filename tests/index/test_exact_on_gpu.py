"""Exact search on a GPU equals that on a CPU, bit for bit. Needs only torch, numpy and pytest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from index_helpers import same_bits, shards_of

from index.exact import search as exact
from index.exact import windows
from index.files import InputError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["whole numbers", "real numbers", "normalized", "collapsed", "huge"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("window", [2**14, 2**30])
def test_gpu_results_equal_cpu_results_bit_for_bit(rng, monkeypatch, kind: str, dtype: type, window: int) -> None:
    monkeypatch.setitem(windows.WINDOW_BYTES, "cuda", window)
    passages = rng.standard_normal((5000, 48)).astype(np.float32)
    queries = rng.standard_normal((50, 48)).astype(np.float32)
    if kind == "whole numbers":
        passages, queries = np.round(passages), np.round(queries)
    elif kind == "normalized":
        passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    elif kind == "collapsed":
        passages = 1 + 1e-3 * passages
    elif kind == "huge":
        passages *= 1e4 if dtype == np.float16 else 1e20
    passages = passages.astype(dtype)
    ids = [f"d{n}" for n in rng.permutation(5000)]
    shards = shards_of(passages, 1300)
    expected = exact.search(queries, shards, ids, 100, block_rows=700)
    same_bits(exact.search(queries, shards, ids, 100, block_rows=700, device="cuda"), expected)
    there = [(first, torch.from_numpy(vectors).cuda()) for first, vectors in shards]
    same_bits(exact.search(queries, there, ids, 100, device="cuda"), expected)


def test_an_error_on_the_gpu_does_not_affect_the_next_search(rng) -> None:
    passages = rng.standard_normal((40000, 32)).astype(np.float32)
    ids = [f"d{n}" for n in range(40000)]
    bad = passages.copy()
    bad[30000, 3] = np.nan
    with pytest.raises(InputError, match="row 30000, passage 'd30000': expected a finite vector"):
        exact.search(passages[:5], shards_of(bad, 7000), ids, 10, device="cuda")
    with pytest.raises(ValueError, match="shards: expected"):
        exact.search(passages[:5], [(0, passages), (1, passages)], ids, 10, device="cuda")
    shards = shards_of(passages, 7000)
    expected = exact.search(passages[:5], shards, ids, 10)
    same_bits(exact.search(passages[:5], shards, ids, 10, device="cuda"), expected)


def test_legacy_tf32_settings_do_not_change_gpu_results(rng) -> None:
    passages, queries = rng.standard_normal((3000, 64)).astype(np.float32), rng.standard_normal((20, 64))
    ids = [f"d{n}" for n in range(3000)]
    expected = exact.search(queries, [(0, passages)], ids, 50)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.set_float32_matmul_precision("high")
    try:
        found = exact.search(queries, [(0, passages)], ids, 50, device="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before
    same_bits(found, expected)
