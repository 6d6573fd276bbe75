"""Qrels and run files with comments, blank lines and ties score as in trec_eval."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import MEASURES, Qrels, Run, evaluate_run
from eval.runs import read_trec_run
from index.beir import read_qrels

KS = (1, 3, 10, 1000)
NAMES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "success": "success"}
# Some ids are used on both sides, and some contain the comment character.
QUERIES, PASSAGES = ["1", "2", "q#3"], ["1", "2", "#d", "é", "10", "9"]
QRELS = st.dictionaries(
    st.sampled_from(QUERIES), st.dictionaries(st.sampled_from(PASSAGES), st.integers(0, 3), min_size=1), min_size=1
)
SCORES = st.sampled_from(["1", "1.0", "1.000000001", "0.5", "5e-1", "-3", "1e39", "0"])
RUNS = st.dictionaries(st.sampled_from(QUERIES), st.dictionaries(st.sampled_from(PASSAGES), SCORES, min_size=1))
IGNORED_LINES = st.sampled_from(["", "\n", "# a comment\n", "#\n", "#1 0 d 1\n", "   \n"])


def lines(data: st.DataObject, rows: list[str]) -> str:
    return "".join(data.draw(IGNORED_LINES) + row + "\n" for row in rows) + data.draw(IGNORED_LINES)


def written(data: st.DataObject, grade: int) -> str:
    return data.draw(st.sampled_from([f"{grade}", f"{grade}.0", f"+{grade}", f"{grade}e0"]))


@settings(max_examples=100, deadline=None)
@given(QRELS, RUNS, st.sampled_from(["\t", " ", "  "]), st.booleans(), st.data())
def test_files_score_as_in_trec_eval(qrels: Qrels, run: Run, sep: str, trec: bool, data: st.DataObject) -> None:
    judged = [
        sep.join([query, *(["0"] if trec else []), passage, written(data, grade)])
        for query, grades in qrels.items()
        for passage, grade in grades.items()
    ]
    found = [
        sep.join([query, "Q0", passage, "1", score, "tag"])
        for query, scores in run.items()
        for passage, score in scores.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "qrels", Path(folder) / "run"
        paths[0].write_text(lines(data, judged), encoding="utf-8")
        paths[1].write_text(lines(data, found), encoding="utf-8")
        ours = evaluate_run(read_qrels(paths[0]), read_trec_run(paths[1]), KS, drop_identical=False)
    asked = {query: scores for query, scores in pytrec_eval.parse_run(found).items() if query in qrels}
    cuts = ",".join(map(str, KS))
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {f"{name}.{cuts}" for name in NAMES.values()}).evaluate(asked)
    assert set(NAMES) < set(MEASURES) and list(ours.per_query) == list(qrels)
    for query in qrels:
        for name, theirs_name in NAMES.items():
            for k in KS:
                assert ours.per_query[query][f"{name}@{k}"] == theirs.get(query, {}).get(f"{theirs_name}_{k}", 0.0)
