"""A passage with its query's id is removed unless the qrels judge the pair, counted, and kept on request."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import Qrels, Run, drop_identical_ids, evaluate_run
from eval.ranking import RankedRun, without_identical_ids
from eval.sets.plan import mean_of

KS = (1, 2, 5, 1000)
CUTS = ",".join(map(str, KS))
ASKED = {f"{name}.{CUTS}" for name in ("ndcg_cut", "map_cut", "recall", "P", "success")}
THEIRS = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "success": "success"}

# Queries and passages share their ids.
NUMBERS = st.sampled_from([str(number) for number in range(7)])
QRELS = st.dictionaries(NUMBERS, st.dictionaries(NUMBERS, st.integers(0, 3), min_size=1), min_size=1)
RUNS = st.dictionaries(NUMBERS, st.dictionaries(NUMBERS, st.sampled_from([0.0, 0.5, 1.0, 1.0 + 1e-9, 2.0])))


def by_trec_eval(qrels: Qrels, run: Run) -> dict[str, dict[str, float]]:
    asked = {query: scores for query, scores in run.items() if scores and query in qrels}
    found = pytrec_eval.RelevanceEvaluator(qrels, ASKED).evaluate(asked)
    return {
        query: {
            f"{ours}@{k}": found.get(query, {}).get(f"{theirs}_{k}", 0.0) for ours, theirs in THEIRS.items() for k in KS
        }
        for query in qrels
    }


@settings(max_examples=150, deadline=None)
@given(QRELS, RUNS)
def test_sets_with_shared_ids_score_as_in_trec_eval(qrels: Qrels, run: Run) -> None:
    """Includes cut-offs deeper than any run; runs have at most seven passages."""
    rest = {
        query: {passage: score for passage, score in scores.items() if passage != query or query in qrels[query]}
        for query, scores in run.items()
        if query in qrels
    }
    kept, dropped = evaluate_run(qrels, run, KS, drop_identical=False), evaluate_run(qrels, run, KS)
    for ours, theirs in ((kept, by_trec_eval(qrels, run)), (dropped, by_trec_eval(qrels, rest))):
        for query, row in theirs.items():
            for measure, value in row.items():
                assert ours.per_query[query][measure] == value, (query, measure)
    count = sum(query in scores and query not in qrels[query] for query, scores in run.items() if query in qrels)
    assert (kept.identical_ids_left_out, dropped.identical_ids_left_out) == (0, count)


@settings(max_examples=60, deadline=None)
@given(QRELS, RUNS)
def test_all_ways_to_remove_identical_ids_agree(qrels: Qrels, run: Run) -> None:
    plain = drop_identical_ids(run, qrels)
    ranked = without_identical_ids(RankedRun.of(run), qrels)
    assert ranked == RankedRun.of(plain)
    assert ranked.left_out == sum(len(scores) - len(plain[query]) for query, scores in run.items())
    # Counted once, whether removed before or during the evaluation.
    judged = RankedRun.of({query: scores for query, scores in run.items() if query in qrels})
    first = evaluate_run(qrels, without_identical_ids(judged, qrels), KS)
    assert first == evaluate_run(qrels, judged, KS)


@pytest.mark.parametrize("grade", [1, 0, -1])
def test_a_judged_pair_of_equal_ids_counts_whatever_its_grade(grade: int) -> None:
    found = evaluate_run({"7": {"7": grade, "8": 1}}, {"7": {"7": 2.0, "8": 1.0}}, (1, 2))
    assert found.mean["precision@2"] == (1.0 if grade > 0 else 0.5)
    assert found.mean["mrr@2"] == (1.0 if grade > 0 else 0.5) and found.identical_ids_left_out == 0


def test_removals_below_the_cut_off_are_counted() -> None:
    run = {"q": {f"d{i}": 9.0 - i for i in range(5)} | {"q": 0.5}}
    assert evaluate_run({"q": {"d1": 1}}, run, (1,)).identical_ids_left_out == 1
    cut = without_identical_ids(RankedRun.of(run), {"q": {"d1": 1}}, 2)
    assert (list(cut["q"]), cut.left_out, cut.cut(1).left_out, cut.depth) == (["d0", "d1"], 1, 1, 2)


def test_the_mean_of_sets_sums_their_removed_passages() -> None:
    parts = {name: evaluate_run({"1": {"2": 1}}, {"1": {"1": 1.0, "2": 0.5}}, (1,)) for name in ("a", "b")}
    assert mean_of(parts).identical_ids_left_out == 2 and np.isclose(mean_of(parts).mean["mrr@1"], 1.0)
