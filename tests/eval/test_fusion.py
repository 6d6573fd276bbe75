"""Fused runs equal the formulas for all queries and passages of the runs."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest

from eval import fusion
from eval.fusion import METHODS, fuse
from eval.metrics import Run
from eval.ranking import RankedRun, trec_order

A: Run = {"q1": {"x": 9.0, "y": 7.0, "z": 1.0}, "q2": {"x": 1.0}}
B: Run = {"q1": {"y": 0.5, "w": 0.25}, "q3": {"v": 2.0, "u": 2.0}}


def test_reciprocal_ranks_by_hand() -> None:
    fused = fuse([A, B], "rrf")
    expected = {"y": 1 / 62 + 1 / 61, "x": 1 / 61, "w": 1 / 62, "z": 1 / 63}
    assert fused["q1"] == pytest.approx(expected) and list(fused["q1"]) == ["y", "x", "w", "z"]
    assert fused["q2"] == pytest.approx({"x": 1 / 61})
    # Tied scores are ranked in trec_eval's order, by id descending.
    assert list(fused["q3"].items()) == [("v", pytest.approx(1 / 61)), ("u", pytest.approx(1 / 62))]
    assert list(fused) == ["q1", "q2", "q3"]


def test_min_max_by_hand() -> None:
    fused = fuse([A, B], "minmax", weights=[0.3, 0.7])
    assert fused["q1"] == pytest.approx({"x": 0.3, "y": 0.3 * 6 / 8 + 0.7, "z": 0.0, "w": 0.0})
    assert fused["q2"] == pytest.approx({"x": 0.3}) and fused["q3"] == pytest.approx({"u": 0.7, "v": 0.7})


def test_z_scores_by_hand_with_the_lowest_value_for_absent_passages() -> None:
    fused = fuse([A, B], "zscore")
    mean, deviation = statistics.fmean([9, 7, 1]), statistics.pstdev([9, 7, 1])
    z = {passage: (score - mean) / deviation for passage, score in A["q1"].items()}
    expected = {"x": z["x"] - 1, "y": z["y"] + 1, "z": z["z"] - 1, "w": z["z"] - 1}
    assert fused["q1"] == pytest.approx(expected, abs=1e-6)


def test_fusion_of_random_runs_equals_a_direct_sum() -> None:
    generator = random.Random(1)
    runs: list[Run] = [
        {
            f"q{q}": {f"d{d}": generator.random() for d in generator.sample(range(60), generator.randint(1, 25))}
            for q in generator.sample(range(12), 10)
        }
        for _ in range(3)
    ]
    scored = fuse(runs, "zscore", weights=[1, 2, 0.5])
    for query in {q for run in runs for q in run}:
        expected = dict.fromkeys((p for run in runs for p in run.get(query, {})), 0.0)
        for run, weight in zip(runs, (1, 2, 0.5), strict=True):
            values = list(run.get(query, {}).values())
            spread = statistics.pstdev(values) if len(set(values)) > 1 else 1.0
            z = {p: (score - statistics.fmean(values)) / spread for p, score in run.get(query, {}).items()}
            for passage in expected:
                expected[passage] += weight * z.get(passage, min(z.values(), default=0.0))
        assert scored[query] == pytest.approx(expected, abs=1e-5)
    fused = fuse(runs, "rrf", weights=[1, 2, 0.5], rrf_k=10)
    for query in {q for run in runs for q in run}:
        expected = {}
        for run, weight in zip(runs, (1, 2, 0.5), strict=True):
            for rank, (passage, _) in enumerate(trec_order(run.get(query, {})), start=1):
                expected[passage] = expected.get(passage, 0.0) + weight / (10 + rank)
        assert fused[query] == pytest.approx(expected, rel=1e-6)


def test_a_run_fused_to_depth_k_is_the_top_k_of_the_full_one() -> None:
    generator = random.Random(3)
    runs = [{"q": {f"d{d:02}": float(generator.randint(0, 3)) for d in range(40)}} for _ in range(2)]
    whole = list(fuse(runs, "minmax")["q"].items())
    for k in (1, 7, 39, 40):
        assert list(fuse(runs, "minmax", k=k)["q"].items()) == whole[:k]


def test_the_query_batch_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{f"q{q}": {f"d{d}": (q * d * run) % 7 / 7 for d in range(q, 9)} for q in range(8)} for run in (1, 2)]
    whole = {method: fuse(runs, method) for method in METHODS}
    monkeypatch.setattr(fusion, "QUERY_BATCH", 3)
    for method, one in whole.items():
        assert {query: list(found.items()) for query, found in fuse(runs, method).items()} == {
            query: list(found.items()) for query, found in one.items()
        }


def test_only_passages_of_the_runs_enter_the_fused_table() -> None:
    passages = [f"d{row}" for row in range(100_000)]
    one = RankedRun(["q"], passages, np.array([[7, 99_999, -1]]), np.array([[2.0, 1.0, 0.0]]))
    fused = fuse([one, {"q": {"d7": 1.0}, "empty": {}}])
    assert fused["q"] == pytest.approx({"d7": 2 / 61, "d99999": 1 / 62}) and len(fused.passages) == 2
    assert fused["empty"] == {}


def test_bad_arguments_are_refused() -> None:
    for arguments, message in (
        ({"runs": [A]}, "at least two"),
        ({"runs": [A, B], "method": "borda"}, "rrf, minmax, zscore"),
        ({"runs": [A, B], "weights": [1.0]}, "weights: expected 2"),
        ({"runs": [A, B], "weights": [0.0, 0.0]}, "not all 0"),
        # Sums of these would all be infinite, or all 0.
        *(
            ({"runs": [A, B], "weights": [weight, 1.0]}, "0 or from 1e-6 to 1e6")
            for weight in (float("nan"), float("inf"), 1e308, 1e-320, -1.0)
        ),
        ({"runs": [A, B], "k": 0}, "k: expected at least 1"),
        ({"runs": [{"q": {"d": float("inf")}}, B], "method": "minmax"}, "infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse(**arguments)  # type: ignore[arg-type]
