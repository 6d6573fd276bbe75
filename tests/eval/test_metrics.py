"""Metrics are bitwise equal to trec_eval's, and equal to the beir package's where it is correct."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import pytrec_eval
from beir.retrieval.evaluation import EvaluateRetrieval
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import Qrels, Run, drop_identical_ids, evaluate_run, trec_order
from index.files import InputError

KS = (1, 3, 5, 10, 100)
OUR_NAMES = {"ndcg": "ndcg_cut_", "map": "map_cut_", "recall": "recall_", "precision": "P_", "success": "success_"}


def random_case(seed: int, *, ties: bool, queries: int = 12, passages: int = 60) -> tuple[Qrels, Run]:
    generator = np.random.default_rng(seed)
    ids = [f"d{i}" for i in range(passages)] + ["é", "Z", "z", "日本"]
    qrels: Qrels = {}
    run: Run = {}
    for i in range(queries):
        judged = generator.choice(ids, size=generator.integers(1, 12), replace=False)
        qrels[f"q{i}"] = {str(d): int(g) for d, g in zip(judged, generator.integers(-1, 4, len(judged)), strict=True)}
        found = generator.choice(ids, size=generator.integers(1, len(ids)), replace=False)
        scores = generator.integers(0, 4, len(found)) / 3 if ties else generator.normal(size=len(found))
        run[f"q{i}"] = {str(d): float(s) for d, s in zip(found, scores, strict=True)}
    return qrels, run


def reciprocal_rank(grades: dict[str, int], scores: dict[str, float], k: int) -> float:
    order = sorted(scores, key=lambda d: (np.float32(scores[d]), d.encode()), reverse=True)
    return next((1 / rank for rank, d in enumerate(order[:k], 1) if grades.get(d, 0) > 0), 0.0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_query_equals_trec_eval(seed: int, ties: bool) -> None:
    qrels, run = random_case(seed, ties=ties)
    ours = evaluate_run(qrels, run, KS)
    cuts = ",".join(map(str, KS))
    names = {f"ndcg_cut.{cuts}", f"map_cut.{cuts}", f"recall.{cuts}", f"P.{cuts}", f"success.{cuts}"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run)
    for query, row in ours.per_query.items():
        for k in KS:
            for name, prefix in OUR_NAMES.items():
                assert row[f"{name}@{k}"] == theirs[query][f"{prefix}{k}"]
            assert row[f"mrr@{k}"] == pytest.approx(reciprocal_rank(qrels[query], run[query], k), abs=1e-12)
            relevant = sum(grade > 0 for grade in qrels[query].values())
            found = theirs[query][f"recall_{k}"] * relevant
            assert row[f"rcap@{k}"] == pytest.approx(found / max(1, min(relevant, k)), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_means_equal_the_beir_package_when_every_query_is_answered(ties: bool) -> None:
    qrels, run = random_case(7, ties=ties)
    ours = evaluate_run(qrels, run, KS).mean
    measured = EvaluateRetrieval.evaluate(qrels, copy.deepcopy(run), list(KS))
    for name, theirs in zip(("NDCG", "MAP", "Recall", "P"), measured, strict=True):
        key = {"P": "precision"}.get(name, name.lower())
        for k in KS:
            assert ours[f"{key}@{k}"] == pytest.approx(theirs[f"{name}@{k}"], abs=5.1e-6)
    if not ties and all(any(grade > 0 for grade in grades.values()) for grades in qrels.values()):
        theirs = EvaluateRetrieval.evaluate_custom(qrels, copy.deepcopy(run), list(KS), "r_cap")
        for k in KS:
            assert ours[f"rcap@{k}"] == pytest.approx(theirs[f"R_cap@{k}"], abs=5.1e-6)
    if not ties:
        theirs = EvaluateRetrieval.evaluate_custom(qrels, copy.deepcopy(run), list(KS), "mrr")
        for k in KS:
            assert ours[f"mrr@{k}"] == pytest.approx(theirs[f"MRR@{k}"], abs=5.1e-6)


# Grades below 0 are tested separately: pytrec_eval crashed here with grades of -2.
GRADES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 5), min_size=1)
QRELS = st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), GRADES, min_size=1)
SCORES = st.dictionaries(
    st.sampled_from("abcdefghijé日"),
    st.sampled_from(
        [0.0, -0.0, 1e-9, 1e-46, 1.0, 1.0 + 1e-9, 1e38, 1e39, -1.0, -1.0 - 1e-9, -1e39, math.inf, -math.inf]
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    QRELS,
    st.dictionaries(st.sampled_from(["q1", "q2", "q4"]), SCORES),
)
def test_ties_and_missing_queries_score_as_in_trec_eval(qrels: Qrels, run: Run) -> None:
    ours = evaluate_run(qrels, run, KS)
    cuts = ",".join(map(str, KS))
    names = {f"{name}.{cuts}" for name in ("ndcg_cut", "map_cut", "recall", "P", "success")} | {"recip_rank"}
    asked = {query: scores for query, scores in run.items() if scores and query in qrels}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(asked)
    for query in qrels:
        # No run is deeper than 100.
        assert ours.per_query[query]["mrr@100"] == theirs.get(query, {}).get("recip_rank", 0.0)
        for k in KS:
            for name, prefix in OUR_NAMES.items():
                assert ours.per_query[query][f"{name}@{k}"] == theirs.get(query, {}).get(f"{prefix}{k}", 0.0)
    assert ours.missing == [query for query in qrels if query not in asked]


@pytest.mark.parametrize("queries", [1024, 1025, 2500])
def test_many_queries_score_as_in_trec_eval(queries: int) -> None:
    """More queries than one batch; ties; missing, empty and unjudged queries; another order than the qrels."""
    generator = np.random.default_rng(queries)
    qrels, run = random_case(queries, ties=True, queries=queries, passages=40)
    for query in generator.choice(list(qrels), 40, replace=False).tolist():
        del run[query]
    for query in generator.choice(list(run), 40, replace=False).tolist():
        run[query] = {}
    names = list(run)
    run = {names[place]: run[names[place]] for place in generator.permutation(len(names))} | {"stranger": {"d1": 1.0}}
    ours = evaluate_run(qrels, run, KS)
    cuts = ",".join(map(str, KS))
    asked = {query: scores for query, scores in run.items() if scores and query in qrels}
    measures = {f"{prefix.rstrip('_')}.{cuts}" for prefix in OUR_NAMES.values()}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(asked)
    assert ours.missing == [query for query in qrels if query not in asked] and len(ours.missing) == 80
    for name, prefix in OUR_NAMES.items():
        for k in KS:
            values = [theirs.get(query, {}).get(f"{prefix}{k}", 0.0) for query in qrels]
            assert ours.per_query.column(f"{name}@{k}").tolist() == values
            assert ours.mean[f"{name}@{k}"] == pytest.approx(sum(values) / queries, abs=1e-12)


def test_grades_below_zero_are_not_relevant() -> None:
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    below = evaluate_run({"q": {"a": -2, "b": 1, "c": -1}}, run, KS).per_query["q"]
    zero = evaluate_run({"q": {"a": 0, "b": 1, "c": 0}}, run, KS).per_query["q"]
    assert below == zero


def test_measures_by_hand() -> None:
    qrels = {"q": {"a": 2, "b": 1, "c": 1, "x": 0}}
    run = {"q": {"x": 4.0, "a": 3.0, "unjudged": 2.0, "b": 1.0}}
    row = evaluate_run(qrels, run, (1, 3, 10)).per_query["q"]
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert row["ndcg@10"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal, abs=1e-12)
    assert row["ndcg@1"] == 0.0
    assert row["map@10"] == pytest.approx((1 / 2 + 2 / 4) / 3, abs=1e-12)
    assert row["recall@3"] == pytest.approx(1 / 3, abs=1e-12)
    assert row["precision@10"] == pytest.approx(0.2, abs=1e-12)
    assert (row["mrr@1"], row["mrr@3"]) == (0.0, 0.5)


def test_ties_are_broken_by_id_descending() -> None:
    run = {"q": {"a": 1.0, "b": 1.0}}
    assert evaluate_run({"q": {"b": 1}}, run, (1,)).mean["mrr@1"] == 1.0
    assert evaluate_run({"q": {"a": 1}}, run, (1,)).mean["mrr@1"] == 0.0


def test_scores_equal_in_float32_tie() -> None:
    run = {"q": {"a": 1.0 + 1e-9, "b": 1.0}}
    assert trec_order(run["q"]) == [("b", 1.0), ("a", 1.0 + 1e-9)]
    assert evaluate_run({"q": {"b": 1}}, run, (1,)).mean["ndcg@1"] == 1.0


ID = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(ID, st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_trec_order_equals_trec_eval(scores: dict[str, float]) -> None:
    for rank, (passage, _) in enumerate(trec_order(scores), start=1):
        found = pytrec_eval.RelevanceEvaluator({"q": {passage: 1}}, {"recip_rank"}).evaluate({"q": scores})
        assert found["q"]["recip_rank"] == pytest.approx(1 / rank)


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 49, 93, 100, 101, 997, 1000])
def test_mrr_ignores_ranks_below_k(rank: int) -> None:
    run = {"q": {f"d{i:04}": float(-i) for i in range(1, 1101)}}
    mean = evaluate_run({"q": {f"d{rank:04}": 1}}, run, (rank, max(1, rank - 1))).mean
    assert mean[f"mrr@{rank}"] == pytest.approx(1 / rank, abs=1e-12)
    assert rank == 1 or mean[f"mrr@{rank - 1}"] == 0.0


def test_missing_queries_are_named_and_count_as_zero() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 1}}
    found = evaluate_run(qrels, {"q1": {"a": 1.0}, "q2": {}, "stranger": {"a": 1.0}}, (1,))
    assert found.missing == ["q2", "q3"]
    assert list(found.per_query) == ["q1", "q2", "q3"]
    assert {name: value * 3 for name, value in found.mean.items()} == dict.fromkeys(found.mean, 1.0)


def test_an_empty_run_scores_zero() -> None:
    found = evaluate_run({"q": {"a": 1}}, {}, (10,))
    assert found.missing == ["q"] and set(found.mean.values()) == {0.0}


def test_a_query_without_relevant_passages_counts_as_in_trec_eval() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"a": 0}}
    run = {"q1": {"a": 1.0}, "q2": {"a": 1.0}}
    assert evaluate_run(qrels, run, (10,)).mean["ndcg@10"] == 0.5
    assert EvaluateRetrieval.evaluate(qrels, run, [10])[0]["NDCG@10"] == 0.5


def test_identical_ids_are_dropped_as_in_beir_without_changing_the_run() -> None:
    qrels = {"q": {"a": 1}}
    run = {"q": {"q": 2.0, "a": 1.0}}
    assert evaluate_run(qrels, run, (1,)).mean["ndcg@1"] == 1.0
    assert evaluate_run(qrels, run, (1,), drop_identical=False).mean["ndcg@1"] == 0.0
    assert drop_identical_ids(run) == {"q": {"a": 1.0}}
    assert run == {"q": {"q": 2.0, "a": 1.0}}


def test_measures_after_a_removal_use_k_remaining_passages() -> None:
    qrels = {"q": {"a": 1}, "p": {"b": 1}}
    run = {"q": {"q": 3.0, "b": 2.0, "a": 1.0}, "p": {"p": 2.0, "q": 1.0, "b": 0.5}}
    assert evaluate_run(qrels, run, (2,)).mean["recall@2"] == 1.0
    assert evaluate_run({"q": {"a": 1}}, {"q": {"q": 1.0}}).missing == ["q"]


def test_capped_recall_and_success() -> None:
    qrels = {"q": {"a": 1, "b": 2, "c": 1}}
    row = evaluate_run(qrels, {"q": {"x": 3.0, "b": 2.0, "c": 1.0}}, (1, 2, 10)).per_query["q"]
    assert [row[f"rcap@{k}"] for k in (1, 2, 10)] == [0.0, 0.5, pytest.approx(2 / 3)]
    assert [row[f"success@{k}"] for k in (1, 2, 10)] == [0.0, 1.0, 1.0]


def test_column_returns_one_measure_of_all_queries() -> None:
    qrels, run = random_case(3, ties=True)
    found = evaluate_run(qrels, run, KS)
    assert found.per_query.column("ndcg@10").tolist() == [row["ndcg@10"] for row in found.per_query.values()]


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="query q, passage b, found NaN"):
        evaluate_run({"q": {"a": 1}}, {"q": {"a": 1.0, "b": math.nan}})


def test_empty_qrels_and_invalid_cut_offs_are_refused() -> None:
    with pytest.raises(InputError, match="at least one judged query"):
        evaluate_run({}, {"q": {"a": 1.0}})
    with pytest.raises(ValueError, match="ks"):
        evaluate_run({"q": {"a": 1}}, {}, (0, 10))
