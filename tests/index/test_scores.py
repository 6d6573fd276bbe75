"""Scores of pairs, by each method of summation, against exact sums."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from index_helpers import same_bits

from index.exact import products, scores
from index.exact import search as exact


@pytest.mark.parametrize("way", [scores._gathered_sums, scores._sampled_sums])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("pairs", [0, 1, 5000])
def test_pair_sums_equal_inner_products(rng, monkeypatch, way, dtype: torch.dtype, pairs: int) -> None:
    """Pairs in any order, with repeated and missing passages, and more pairs than one step processes."""
    monkeypatch.setitem(scores.FLOAT64_AT_ONCE, "cpu", 7 * 33)
    queries = torch.from_numpy(rng.standard_normal((20, 33)))
    passages = torch.from_numpy(rng.standard_normal((300, 33))).to(dtype)
    chosen = torch.from_numpy(rng.permutation(20 * 290)[:pairs])
    query, passage = chosen % 20, chosen // 20
    found = way(queries, passages, query, passage)
    expected = [math.fsum(row) for row in (queries[query] * passages[passage].double()).tolist()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)
    assert found.dtype == torch.float64


def test_sums_of_vectors_without_dimensions_are_zero() -> None:
    nothing, place = torch.zeros(2, 0, dtype=torch.float64), torch.tensor([0, 1])
    assert scores._sampled_sums(nothing, nothing.float(), place, place).tolist() == [0.0, 0.0]


def test_scoring_emits_no_warnings(rng) -> None:
    passages = rng.standard_normal((50, 8)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact.search(passages[:3], [(0, passages)], [f"d{row}" for row in range(50)], 5)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("order", ["random", "ascending", "equal"])
def test_slicing_a_block_does_not_change_results(rng, monkeypatch, half: torch.dtype | None, order: str) -> None:
    monkeypatch.setattr(exact, "half_type", lambda device: half)
    passages = rng.standard_normal((700, 24)).astype(np.float32)
    queries = rng.standard_normal((13, 24)).astype(np.float32)
    if order == "ascending":
        passages = passages[np.argsort(passages @ queries[0])]
    elif order == "equal":
        passages[:] = passages[0]
    ids = [f"d{row}" for row in rng.permutation(700)]
    for k in (1, 40, 650):
        expected = exact.search(queries, [(0, passages)], ids, k)
        for rows in (1, 37, 300):
            monkeypatch.setitem(products.SLICE_ROWS, "cpu", rows)
            same_bits(exact.search(queries, [(0, passages)], ids, k, block_rows=512), expected)
        monkeypatch.setitem(products.SLICE_ROWS, "cpu", 2048)


@pytest.mark.parametrize("faster", [True, False])
def test_bfloat16_is_used_on_a_cpu_only_if_it_is_faster(monkeypatch, faster: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(products, "_multiplies_faster", lambda half: faster)
    assert products.half_type(torch.device("cpu")) == (torch.bfloat16 if faster else None)


@pytest.mark.parametrize(("half_seconds", "faster"), [(1.0, True), (3.0, False)])
def test_the_faster_precision_is_found_by_timing(monkeypatch, half_seconds: float, faster: bool) -> None:
    clock = iter(np.cumsum([0.0] + 6 * [2.0, 0.0, half_seconds, 0.0]).tolist())
    monkeypatch.setattr(products.time, "perf_counter", lambda: next(clock))
    threads = torch.get_num_threads()
    assert products._multiplies_faster.__wrapped__(torch.bfloat16) is faster
    assert torch.get_num_threads() == threads
