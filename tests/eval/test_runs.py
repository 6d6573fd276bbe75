"""TREC run files round-trip in trec_eval's order; invalid lines are reported by number."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from eval.metrics import evaluate_run, trec_order
from eval.runs import read_trec_run, write_trec_run
from index.files import InputError


def test_float32_scores_round_trip_exactly(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(size=500), 10.0 ** generator.uniform(-30, 30, 200)]).astype(np.float32)
    run = {"q1": {f"d{i}": float(v) for i, v in enumerate(values)}, "q2": {"d1": 0.1, "d2": 0.1}}
    write_trec_run(tmp_path / "run.trec", run, "test")
    again = read_trec_run(tmp_path / "run.trec")
    assert {q: {d: np.float32(s) for d, s in scores.items()} for q, scores in again.items()} == {
        q: {d: np.float32(s) for d, s in scores.items()} for q, scores in run.items()
    }
    assert [trec_order(scores) for scores in again.values()] == [list(scores.items()) for scores in again.values()]
    qrels = {"q1": {"d3": 1, "d600": 2}, "q2": {"d1": 1}}
    assert evaluate_run(qrels, again) == evaluate_run(qrels, run)


def test_lines_have_trec_evals_format(tmp_path: Path) -> None:
    write_trec_run(tmp_path / "run.trec", {"q": {"a": 0.5, "b": 0.5, "c": 2}}, "mine")
    text = (tmp_path / "run.trec").read_text()
    assert text == "q Q0 c 1 2 mine\nq Q0 b 2 0.5 mine\nq Q0 a 3 0.5 mine\n"
    assert pytrec_eval.parse_run(text.splitlines()) == {"q": {"a": 0.5, "b": 0.5, "c": 2.0}}


def test_lines_that_begin_with_a_number_sign_are_comments(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("# run of a system\nq Q0 a 1 2.0 t\n#q Q0 b 2 1.5 t\n\n   # indented\nq Q0 #c 3 1.0 t\n#")
    assert read_trec_run(path) == {"q": {"a": 2.0, "#c": 1.0}}
    path.write_text("# run of a system\nq Q0 a 1 2.0 t\nq Q0 b 1\n")
    with pytest.raises(InputError, match=r"run\.trec:3: expected 6 columns"):
        read_trec_run(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 d 1 0.5", "run.trec:2: expected 6 columns .* found 5"),
        ("q Q0 d 1 high tag", "run.trec:2: expected a whole rank and a score"),
        ("q Q0 d first 0.5 tag", "run.trec:2: expected a whole rank and a score"),
        ("q Q0 d 1 nan tag", "run.trec:2: expected a number as score, found NaN"),
        ("q Q0 d 1 1_0 tag", "run.trec:2: expected a whole rank and a score"),
        ("q Q0 d 1 ３ tag", "run.trec:2: expected a whole rank and a score"),
        ("d 1 q Q0 a 2 0.5 tag", "run.trec:2: expected 6 columns .* found 8"),
        ("q Q0 a 2 0.5 tag", "run.trec:2: expected each passage once per query, found a again for query q"),
    ],
)
def test_invalid_lines_are_refused_with_their_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "run.trec").write_text(f"q Q0 a 1 1.0 tag\n{line}\n")
    with pytest.raises(InputError, match=message):
        read_trec_run(tmp_path / "run.trec")


@pytest.mark.parametrize(
    ("run", "tag"),
    [
        ({"q": {"a b": 1.0}}, "t"),
        ({"#q": {"a": 1.0}}, "t"),
        ({"q 1": {"a": 1.0}}, "t"),
        ({}, "my tag"),
        ({"q": {"a": math.nan}}, "t"),
    ],
)
def test_ids_and_scores_that_cannot_round_trip_are_refused(
    tmp_path: Path, run: dict[str, dict[str, float]], tag: str
) -> None:
    with pytest.raises(InputError):
        write_trec_run(tmp_path / "run.trec", run, tag)
    assert list(tmp_path.iterdir()) == []
