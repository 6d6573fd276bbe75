"""`retriever evaluate compare` and `run`: from run files and reports to one table, tests and a report."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from unittest import mock

import pytest
import pytrec_eval
from cli_helpers import command, write_lines

from eval.bm25.search import bm25_run
from eval.fusion import fuse
from eval.metrics import Run, evaluate_run
from eval.runs import read_trec_run, write_trec_run
from index.beir import BeirDataset

WORDS = [
    f"{first}{second}" for first in ("amber", "cedar", "ember", "fjord") for second in ("", "ess", "in", "o", "um")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two BEIR folders of 20 queries, and the runs of a poor and of a good system on each."""
    place = tmp_path_factory.mktemp("compare")
    for number, name in enumerate(("rocks", "woods")):
        folder = place / name
        write_lines(folder / "corpus.jsonl", [{"_id": f"d-{w}", "title": "", "text": f"about {w} <b>"} for w in WORDS])
        write_lines(folder / "queries.jsonl", [{"_id": f"q-{w}", "text": f"what is {w}?"} for w in WORDS])
        (folder / "qrels").mkdir()
        rows = "".join(f"q-{w}\td-{w}\t1\n" for w in WORDS)
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
        for system, quality in (("poor", 0.2), ("good", 0.9)):
            write_trec_run(place / system / name / "run.trec", made_run(quality, number), system)
    return place


def made_run(quality: float, seed: int) -> Run:
    generator = random.Random(f"{quality} {seed}")
    run: Run = {}
    for word in WORDS:
        others = generator.sample([w for w in WORDS if w != word], 11)
        scores = {f"d-{other}": 1 - rank / 20 for rank, other in enumerate(others)}
        run[f"q-{word}"] = {**scores, f"d-{word}": 2.0 if generator.random() < quality else 0.51}
    return run


def test_reports_bm25_and_hybrids_are_scored_tested_and_reported(place: Path) -> None:
    out = place / "out"
    done = command(
        *("evaluate", "compare", place / "poor", f"the good={place / 'good'}", "--bm25", "--fuse", "poor+BM25"),
        *("--data", place / "rocks", place / "woods", "--out", out, "--permutations", "2000", "--changed", "2"),
    )
    assert done.code == 0, done.err
    report = json.loads((out / "report.json").read_text())
    assert list(report["sets"]) == ["rocks", "woods"]
    for name, found in report["sets"].items():
        data = BeirDataset.open(place / name)
        poor = read_trec_run(place / "poor" / name / "run.trec")
        bm25 = bm25_run(data.passages(), data.queries)
        expected = {"poor": poor, "BM25": bm25, "poor+BM25 (rrf)": fuse([poor, bm25])}
        assert list(found["systems"]) == ["poor", "the good", "BM25", "poor+BM25 (rrf)"]
        for system, run in expected.items():
            mean = evaluate_run(data.qrels, run).mean
            assert found["systems"][system]["mean"]["ndcg@10"] == pytest.approx(mean["ndcg@10"], abs=1e-12), system
        assert len(found["comparisons"]) == 6 and len(found["changes"]) == 3
        first = found["comparisons"][0]
        assert (first["a"], first["b"]) == ("poor", "the good") and first["p_corrected"] < 0.05
        shown = found["changes"][0]["better"][0]
        assert len(found["changes"][0]["better"]) == 2 and shown["text"].startswith("what is")
        assert any(passage["grade"] == 1 and passage["rank_b"] == 1 for passage in shown["passages"])
    assert read_trec_run(out / "rocks" / "poor+BM25_rrf.trec")["q-amber"]
    details = report["details"]
    assert details["the good"]["from"] == str(place / "good") and len(details["poor"]["run rocks sha256"]) == 64
    assert "seed 0" in details["tests"] and details["BM25"]["k1"] == 0.9 and "numpy" in details["versions"]
    assert "| poor → the good |" in done.out and "mean of 2 sets" in done.out
    page = (out / "report.html").read_text()
    assert "about amber &lt;b&gt;" in page and "<b> " not in page


def test_one_run_file_of_another_program_is_scored(place: Path) -> None:
    run = place / "poor" / "rocks" / "run.trec"
    done = command("evaluate", "run", f"poor={run}", "--data", place / "rocks", "--out", place / "single", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["sets"]["rocks"]
    qrels = BeirDataset.open(place / "rocks").qrels
    assert found["systems"]["poor"]["mean"]["map@10"] == evaluate_run(qrels, read_trec_run(run)).mean["map@10"]
    assert found["comparisons"] == [] and found["changes"] == []


def test_queries_that_a_run_misses_are_counted_and_named_on_the_terminal(place: Path, tmp_path: Path) -> None:
    few = dict(list(made_run(0.5, 1).items())[:2])
    write_trec_run(tmp_path / "few.trec", few, "x")
    words = ["evaluate", "run", tmp_path / "few.trec", "--data", place / "rocks", "--out", tmp_path / "out"]
    first = ", ".join(f"q-{word}" for word in WORDS if f"q-{word}" not in few).split(", ")[:3]
    said = f"few: 18 of 20 queries got no passage and count as 0: {', '.join(first)}, …"
    assert said in command(*words).out
    assert "got no passage" not in command(*words[:2], place / "poor", *words[3:]).out


def test_the_same_comparison_gives_the_same_bytes(place: Path) -> None:
    words = ["evaluate", "compare", place / "poor", place / "good", "--data", place / "woods", "--permutations", "500"]
    for name in ("one", "two"):
        assert command(*words, "--out", place / name).code == 0
    for file in ("report.json", "report.md", "report.html"):
        assert (place / "one" / file).read_bytes() == (place / "two" / file).read_bytes(), file


def test_bm25_is_used_again_until_the_data_or_the_file_changes(place: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(place / "rocks", folder)
    words = ["evaluate", "run", "--bm25", "--data", folder, "--out", out, "--json"]
    with mock.patch("eval.bm25.runs.bm25_run", wraps=bm25_run) as computed:
        first = command(*words)
        assert (first.code, command(*words).out, computed.call_count) == (0, first.out, 1)
        kept = out / "set" / "BM25.trec"
        whole = kept.read_bytes()
        kept.write_bytes(whole.replace(b" 1 ", b" 2 ", 1))
        assert (command(*words).out, computed.call_count, kept.read_bytes()) == (first.out, 2, whole)
        with (folder / "corpus.jsonl").open("a") as stream:
            stream.write('{"_id": "new", "title": "", "text": "amber"}\n')
        assert (command(*words).out != first.out, computed.call_count) == (True, 3)


LANGUAGES = {
    "de": {
        "der größte Planet des Sonnensystems": "Jupiter ist der größte der Planeten",
        "die Hauptstadt von Österreich": "Wien liegt an der Donau und ist Hauptstadt Österreichs; Österreich",
        "ein Gerät, um Nägel einzuschlagen": "mit dem Hammer werden Nägel in das Holz geschlagen",
        "wer schrieb den Faust": "Goethe schrieb seinen Faust in Weimar",
        "die kälteste Jahreszeit": "im Winter, der Jahreszeit des Frostes, fällt Schnee",
        "wie heißt das Junge der Kuh": "das Kalb ist das Junge einer Kuh",
    },
    "zh": {
        "中国的首都是哪里": "北京是中华人民共和国的首都",
        "太阳系最大的行星": "木星是太阳系中体积最大的行星",
        "谁写了红楼梦": "曹雪芹著有长篇小说红楼梦",
        "猫喜欢吃什么": "小猫爱吃鱼",
        "最长的河流": "长江是亚洲第一长河",
        "冬天的天气": "北方冬季寒冷,常下雪,天气干燥",
    },
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_bm25_and_a_model_on_sets_of_other_languages(language: str, minilm: str, tmp_path: Path) -> None:
    pairs = list(LANGUAGES[language].items())
    data = tmp_path / language
    write_lines(data / "corpus.jsonl", [{"_id": f"d{i}", "text": passage} for i, (_, passage) in enumerate(pairs)])
    write_lines(data / "queries.jsonl", [{"_id": f"q{i}", "text": query} for i, (query, _) in enumerate(pairs)])
    (data / "qrels").mkdir()
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(pairs)))
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    words = ["--data", data, "--out", tmp_path / "model", "--model", minilm]
    assert command("evaluate", "beir", *words).code == 0
    words = ["--data", data, "--out", tmp_path / "out", "--json", tmp_path / "model"]
    done = command("evaluate", "compare", *words, "--bm25", "--bm25-stopwords", language)
    assert done.code == 0 and "warning" not in done.err, done.err
    report = json.loads(done.out)
    systems = report["sets"][language]["systems"]
    assert systems["BM25"]["mean"]["ndcg@3"] > 0.9 and systems["model"]["mean"]["ndcg@3"] > 0.5
    assert f"stop words of {language} dropped" in report["details"]["BM25"]["tokens"]


def test_a_warning_where_bm25_finds_nothing_for_most_queries(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "rocks"
    shutil.copytree(place / "rocks", data)
    questions = [{"_id": f"q-{w}", "text": w if place < 9 else "qu'est-ce?"} for place, w in enumerate(WORDS)]
    write_lines(data / "queries.jsonl", questions)
    words = ["evaluate", "run", "--bm25", "--data", data, "--out", tmp_path / "out"]
    for _ in range(2):  # of a run that was kept, too
        done = command(*words)
        assert done.code == 0 and "warning: rocks: BM25 finds nothing for 11 of 20 queries" in done.err
    assert "finds nothing" not in command(*words[:4], place / "rocks", "--out", tmp_path / "whole").err
    done = command(*words, "--bm25-stopwords", "xx")
    assert done.code == 1 and "stop words: expected a language" in done.err and done.err.count("\n") == 1


def test_a_baseline_leaves_fewer_tests_and_is_named(place: Path) -> None:
    words = ["evaluate", "compare", place / "poor", place / "good", "--bm25", "--data", place / "rocks", "--json"]
    done = command(*words, "--baseline", "BM25", "--out", place / "based", "--measure", "mrr@10")
    found = json.loads(done.out)
    pairs = [(pair["a"], pair["b"], pair["measure"]) for pair in found["sets"]["rocks"]["comparisons"]]
    assert pairs == [("BM25", "poor", "mrr@10"), ("BM25", "good", "mrr@10")]
    assert "the pairs with BM25" in found["details"]["tests"]


def test_measures_deeper_than_a_run_are_those_of_trec_eval(place: Path, tmp_path: Path) -> None:
    shallow = {query: dict(list(found.items())[:3]) for query, found in made_run(0.5, 3).items()}
    write_trec_run(tmp_path / "shallow.trec", shallow, "x")
    words = ["evaluate", "compare", tmp_path / "shallow.trec", place / "good", "--data", place / "rocks", "--json"]
    found = json.loads(command(*words, "--out", tmp_path / "out", "--measure", "map@50").out)
    assert found["details"]["data rocks"]["passages a query"] == {"shallow": 3, "good": 12}
    assert found["measure"] == found["sets"]["rocks"]["comparisons"][0]["measure"] == "map@50"
    qrels = BeirDataset.open(place / "rocks").qrels
    asked = {f"{name}.1,10,50,1000" for name in ("ndcg_cut", "map_cut", "recall", "P")}
    names = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
    for name, run in (
        ("shallow", shallow),
        ("good", dict(read_trec_run(place / "good" / "rocks" / "run.trec").items())),
    ):
        mean = found["sets"]["rocks"]["systems"][name]["mean"]
        by_query = pytrec_eval.RelevanceEvaluator(qrels, asked).evaluate(run).values()
        for ours, theirs in names.items():
            for k in (1, 10, 50, 1000):
                expected = math.fsum(row[f"{theirs}_{k}"] for row in by_query) / len(qrels)
                assert mean[f"{ours}@{k}"] == expected, (name, ours, k)
    words.remove("--json")
    done = command(*words, "--out", tmp_path / "out")
    assert "rocks: 2 runs, 20 queries, 3 to 12 passages a query" in done.err
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert all("nDCG@10" in shown for shown in (done.out, page, text))


@pytest.mark.parametrize(("method", "depth"), [("rrf", 2), ("minmax", 20), ("zscore", 1)])
def test_what_else_stands_in_the_table_changes_no_system(place: Path, tmp_path: Path, method: str, depth: int) -> None:
    """A run of any depth beside it: hybrids, BM25 and every other row stay as they are."""
    words = ["--bm25", "--data", place / "rocks", "--json", "--permutations", "10"]
    words += ["--fuse", "poor+good", "good+BM25", "--method", method]
    other = {f"q-{word}": {f"d-{found}": 20.0 - n for n, found in enumerate(WORDS[:depth])} for word in WORDS}
    write_trec_run(tmp_path / "other.trec", other, "x")
    alone, beside = (
        json.loads(command("evaluate", "compare", *runs, *words, "--out", tmp_path / str(len(runs))).out)
        for runs in ([place / "poor", place / "good"], [place / "poor", place / "good", tmp_path / "other.trec"])
    )
    alone, beside = (report["sets"]["rocks"]["systems"] for report in (alone, beside))
    assert beside.pop("other") and beside == alone and len(alone) == 5
    runs = [read_trec_run(place / name / "rocks" / "run.trec") for name in ("poor", "good")]
    expected = evaluate_run(BeirDataset.open(place / "rocks").qrels, fuse(runs, method)).mean["ndcg@10"]
    assert alone[f"poor+good ({method})"]["mean"]["ndcg@10"] == expected


def test_runs_are_cut_for_scoring_and_not_before_they_are_fused(place: Path, tmp_path: Path) -> None:
    words = ["evaluate", "compare", place / "poor", place / "good", "--data", place / "rocks", "--json"]
    found = json.loads(command(*words, "--fuse", "poor+good", "--k", "2", "--out", tmp_path).out)
    runs = [read_trec_run(place / name / "rocks" / "run.trec") for name in ("poor", "good")]
    qrels, systems = BeirDataset.open(place / "rocks").qrels, found["sets"]["rocks"]["systems"]
    for name, run in (("poor", runs[0].cut(2)), ("poor+good (rrf)", fuse(runs).cut(2))):
        assert systems[name]["mean"]["ndcg@10"] == evaluate_run(qrels, run).mean["ndcg@10"]
    assert set(found["details"]["data rocks"]["passages a query"].values()) == {2}


def test_judged_queries_without_text_are_refused_or_allowed_and_count(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "rocks"
    shutil.copytree(place / "rocks", data)
    with (data / "qrels" / "test.tsv").open("a") as stream:
        stream.write("ghost\td-amber\t1\nlost\td-amber\t1\n")
    runs = []
    for system in ("poor", "good"):
        found = dict(read_trec_run(place / system / "rocks" / "run.trec").items())
        # Another program had the query's text, and answered it.
        found["ghost"] = {"d-amber": 1.0} if system == "good" else {"d-cedar": 1.0}
        runs.append(tmp_path / f"{system}.trec")
        write_trec_run(runs[-1], found, system)
    words = ["evaluate", "compare", *runs, "--bm25", "--data", data, "--changed", "30", "--json"]
    refused = command(*words, "--out", tmp_path / "refused")
    assert refused.code == 1 and "expected ids of queries.jsonl, found ghost, which is not there" in refused.err
    done = command(*words, "--allow-dangling", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads(done.out)["sets"]["rocks"]
    assert found["queries"] == 22 and found["systems"]["good"]["missing_queries"] == ["lost"]
    assert found["systems"]["BM25"]["missing_queries"] == ["ghost", "lost"]
    assert [query["text"] for query in found["changes"][0]["better"] if query["id"] == "ghost"] == [""]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{p}/none"], 1, "none: no such file or folder"),
        (["{p}/poor", "{p}/poor"], 1, "expected a different name for each system"),
        (["BM25={p}/poor"], 1, "expected a different name for each system"),
        (["{p}/rocks"], 1, "expected rocks/run.trec"),
        (["{p}/poor/rocks/run.trec", "--data", "{p}/rocks", "{p}/woods"], 1, "expected one data folder for a run file"),
        (["{p}/poor", "--fuse", "poor+BM25"], 2, "--fuse: expected names among poor, found BM25"),
        (["{p}/poor", "--bm25", "--fuse", "poor+BM25", "poor+BM25"], 2, "--fuse: expected each hybrid once"),
        (["{p}/poor", "--out", "{p}/poor"], 2, "--out: expected another folder"),
        (["{p}/poor", "--fuse", "poor"], 2, "--fuse: expected names joined by +"),
        (["{p}/poor", "{p}/good", "--fuse", "poor+good", "--weights", "1"], 2, "--weights: expected 2"),
        *(
            (["{p}/poor", "{p}/good", "--fuse", "poor+good", "--weights", weight, "1"], 2, f"found {weight} 1.0")
            for weight in ("nan", "inf", "1e+308", "1e-320", "-1.0")
        ),
        (["{p}/poor", "{p}/good", "--baseline", "best"], 2, "--baseline: expected one of poor, good, found best"),
        (["{p}/poor", "{p}/good", "--measure", "ndcg@7"], 2, "--measure: expected one of ndcg, map"),
        (["{p}/poor", "--permutations", "0"], 2, "--permutations: expected at least 1"),
        ([], 2, "retriever: systems: expected at least one report or run file"),
    ],
    ids=lambda value: None if isinstance(value, int) else "-".join(value)[-24:] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(words: list[str], code: int, message: str, place: Path, tmp_path: Path) -> None:
    arguments = [word.replace("{p}", str(place)) for word in words]
    data = [] if "--data" in words else ["--data", place / "rocks"]
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    done = command("evaluate", "compare", *arguments, *data, *out)
    assert (done.code, message in done.err, done.err.count("\n")) == (code, True, 1), done.err
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_run_of_other_queries_is_refused(place: Path, tmp_path: Path) -> None:
    write_trec_run(tmp_path / "other.trec", {"x1": {"d-amber": 1.0}}, "x")
    done = command("evaluate", "run", tmp_path / "other.trec", "--data", place / "rocks", "--out", tmp_path / "out")
    assert done.code == 1 and "expected queries of" in done.err and "found x1" in done.err
