"""RankedRun: trec_eval's order from any input order, and equality with the dictionary of dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import evaluate_run
from eval.ranking import RankedRun, rows_of, trec_order
from index.files import InputError

IDS = ["a", "b", "é", "z", "日本", "10", "9"]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("xyz"), st.dictionaries(st.sampled_from(IDS), st.sampled_from([0.5, 1.0, 2.0]))))
def test_a_run_equals_its_dictionary_in_trec_order(run: dict[str, dict[str, float]]) -> None:
    ranked = RankedRun.of(run)
    assert ranked == run
    assert [list(found.items()) for found in ranked.values()] == [trec_order(found) for found in run.values()]


def test_the_input_order_does_not_change_the_run() -> None:
    generator = np.random.default_rng(0)
    rows = np.array([[3, 1, 0, -1, 2], [-1, 4, 6, 5, -1]])
    scores = np.array([[0.5, 0.5, 2.0, 9.0, 0.5], [0.0, -np.inf, 1.0, 1.0, 0.0]])
    wanted = RankedRun(["p", "q"], IDS, rows, scores)
    assert list(wanted["p"]) == ["a", "é", "z", "b"][:1] + sorted(["z", "b", "é"], reverse=True)
    assert list(wanted["q"]) == ["9", "10", "日本"]
    for _ in range(5):
        order = generator.permutation(5)
        again = RankedRun(["p", "q"], IDS, rows[:, order], scores[:, order])
        assert np.array_equal(again.rows, wanted.rows) and np.array_equal(again.scores, wanted.scores)


def test_without_removes_a_passage_and_shifts_the_rest_up() -> None:
    run = RankedRun(["p", "q"], IDS, np.array([[0, 1, 2], [3, 4, -1]]), np.array([[3.0, 2, 1], [3, 2, 0]]))
    assert run.without(np.array([1, -1]), 2) == {"p": {"a": 3.0, "é": 1.0}, "q": {"z": 3.0, "日本": 2.0}}
    assert list(run.without(np.array([-1, 4]))["q"]) == ["z"]


def test_a_run_takes_a_tenth_of_the_memory_of_dictionaries() -> None:
    rows = np.arange(20)[None].repeat(1000, 0)
    run = RankedRun([str(n) for n in range(1000)], [str(n) for n in range(20)], rows, rows[:, ::-1] * 1.0)
    assert run.rows.nbytes + run.scores.nbytes == 8 * 20 * 1000


def test_invalid_runs_are_refused() -> None:
    with pytest.raises(InputError, match="found z again for query q"):
        RankedRun(["p", "q"], IDS, np.array([[0, 1], [3, 3]]), np.zeros((2, 2)))
    with pytest.raises(InputError, match="each query once, found p again"):
        RankedRun(["p", "p"], IDS, np.zeros((2, 0), int), np.zeros((2, 0)))
    with pytest.raises(InputError, match="query q, passage b, found NaN"):
        RankedRun(["p", "q"], IDS, np.array([[0], [1]]), np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match="expected shape"):
        RankedRun(["p"], IDS, np.zeros((2, 1), int), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="expected rows of 7"):
        RankedRun(["p"], IDS, np.array([[7]]), np.zeros((1, 1)))


def test_a_run_without_queries_or_passages_is_valid() -> None:
    assert RankedRun.of({}) == {} and RankedRun.of({"q": {}}) == {"q": {}}
    assert evaluate_run({"q": {"a": 1}}, RankedRun.of({"p": {}})).missing == ["q"]


def test_rows_of_returns_only_wanted_ids() -> None:
    assert rows_of(IDS, {"z", "9", "gone"}) == {"z": 3, "9": 6}
