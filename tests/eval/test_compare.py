"""Comparison of systems by query: pairs, Holm correction, and the queries that changed most."""

from __future__ import annotations

import random

import pytest

from eval.compare import changed_queries, compare, most_changed, passages_to_show, shorten, texts_of
from eval.metrics import Metrics, Qrels, Run, evaluate_run
from eval.ranking import RankedRun
from eval.significance import holm
from index.files import InputError
from index.passages import Passage

QUERIES = 40
QRELS: Qrels = {f"q{i}": {f"d{i}": 1} for i in range(QUERIES)}


def run_with(quality: float, seed: int) -> Run:
    generator = random.Random(seed)
    return {
        f"q{i}": {f"d{i}": 1.0 if generator.random() < quality else 0.1, "d_": 0.5, "e_": 0.4} for i in range(QUERIES)
    }


def systems() -> dict[str, Metrics]:
    return {
        name: evaluate_run(QRELS, run_with(quality, seed), (1, 10))
        for seed, (name, quality) in enumerate({"bad": 0.1, "good": 0.9, "same": 0.9}.items())
    }


def test_every_pair_is_tested_and_corrected_together() -> None:
    pairs = compare(systems(), "mrr@10", permutations=2000)
    assert [(pair.a, pair.b) for pair in pairs] == [("bad", "good"), ("bad", "same"), ("good", "same")]
    assert [pair.p_corrected for pair in pairs] == holm([pair.test.p_randomisation for pair in pairs])
    assert pairs[0].p_corrected < 0.01 < 0.2 < pairs[2].p_corrected
    assert pairs[0].test.difference == pytest.approx(pairs[0].mean_b - pairs[0].mean_a)
    assert pairs[0].test.wins + pairs[0].test.losses + pairs[0].test.ties == QUERIES


def test_with_a_baseline_the_others_are_tested_against_it_only() -> None:
    pairs = compare(systems(), baseline="good", permutations=500)
    assert [(pair.a, pair.b) for pair in pairs] == [("good", "bad"), ("good", "same")]


def test_fewer_than_two_systems_or_queries_give_no_pairs() -> None:
    assert compare({"one": systems()["good"]}) == []
    single = evaluate_run({"q": {"d": 1}}, {"q": {"d": 1.0}})
    assert compare({"one": single, "two": single}) == []


def test_unknown_measures_and_different_queries_are_refused() -> None:
    with pytest.raises(InputError, match="found ndcg@7"):
        compare(systems(), "ndcg@7")
    with pytest.raises(InputError, match="baseline: expected one of bad, good, same, found best"):
        compare(systems(), baseline="best")
    other = evaluate_run({"q0": {"d0": 1}, "q1": {"d1": 1}}, run_with(0.5, 0))
    with pytest.raises(InputError, match="expected the queries of bad"):
        compare({**systems(), "other": other})


def test_queries_that_changed_most_come_largest_change_first() -> None:
    a: Run = {"q1": {"d1": 1.0}, "q2": {"x": 1.0}, "q3": {"x": 2.0, "d3": 1.0}, "q4": {"d4": 1.0}}
    b: Run = {"q1": {"x": 1.0}, "q2": {"d2": 1.0}, "q3": {"d3": 2.0}, "q4": {"d4": 1.0}}
    qrels: Qrels = {f"q{i}": {f"d{i}": 1} for i in range(1, 5)}
    first, second = evaluate_run(qrels, a), evaluate_run(qrels, b)
    assert most_changed(first, second, "ndcg@10", 5) == (["q2", "q3"], ["q1"])
    assert most_changed(first, second, "ndcg@10", 1) == (["q2"], ["q1"])


def test_shown_passages_are_the_top_of_both_runs_and_relevant_ones_with_ranks() -> None:
    a = RankedRun.of({"q": {"x": 3.0, "y": 2.0, "w": 1.5, "d": 1.0}})
    b = RankedRun.of({"q": {"d": 3.0, "x": 2.0}})
    qrels: Qrels = {"q": {"d": 2, "lost": 1, "y": 0}}
    assert passages_to_show("q", qrels, a, b, top=1) == [("d", 4, 1), ("x", 1, 2), ("lost", None, None)]
    metrics = (evaluate_run(qrels, a), evaluate_run(qrels, b))
    (changed,) = changed_queries(["q"], {"q": "why?"}, qrels, metrics, (a, b), "ndcg@10", {"x": "text of x"})
    assert (changed.text, changed.value_a < changed.value_b) == ("why?", True)
    assert [(p.id, p.text, p.grade, p.rank_a, p.rank_b) for p in changed.passages][:2] == [
        ("d", "", 2, 4, 1),
        ("x", "text of x", None, 1, 2),
    ]


def test_only_wanted_texts_are_kept_and_truncated_at_a_word() -> None:
    corpus = (Passage(f"d{i}", "Title", "several words here " * 50) for i in range(1000))
    kept = texts_of(corpus, {"d7"}, length=30)
    assert kept == {"d7": "Title several words here …"}
    assert shorten("  short\n text ", 30) == "short text"


def test_a_query_that_one_run_lacks_can_be_shown() -> None:
    a, b = RankedRun.of({"q": {"d": 1.0}}), RankedRun.of({"other": {"d": 1.0}})
    assert passages_to_show("q", {"q": {"d": 1}}, a, b) == [("d", 1, None)]
