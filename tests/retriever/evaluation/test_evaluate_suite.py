"""`retriever evaluate beir`: several sets, validation, approximate indexes, windows, settings by set, several ranks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli_helpers import MEANINGS, command, write_beir, write_config, write_lines
from forks import LoadedPython

from eval.runs import read_trec_run
from eval.sets.plan import BY_NAME, FORUMS
from index.beir import BeirDataset
from index.files import InputError
from index.store.reader import EmbeddingStore
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.evaluation.long_documents import split_documents
from retriever.evaluation.set_settings import AdjustedTowers, SetSettings, read_settings
from retriever.models.modality import load_towers
from retriever.models.towers import Towers


@pytest.fixture(scope="module")
def towers(world: Any) -> Towers:
    return load_towers(str(world.model))


def evaluate(world: Any, out: Path, *arguments: object) -> dict[str, Any]:
    """Run the command and return its output and the content of evaluation.json."""
    outcome = command("evaluate", "beir", "--model", world.model, "--out", out, *arguments)
    assert outcome.code == 0, outcome.err
    return {"out": outcome.out, "err": outcome.err, **json.loads((out / "evaluation.json").read_text())}


def test_runs_are_bitwise_equal_on_1_2_and_4_processes_and_after_kills(
    python: LoadedPython, world: Any, tmp_path: Path
) -> None:
    script = Path(__file__).parents[1] / "suite_on_ranks.py"
    done = python.run(script, world.model, world.beir, tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if len(line) < 4] == ["2", "4", "0.2", "0.7"]


def test_sets_have_one_row_each_and_the_forums_share_one(world: Any, tmp_path: Path) -> None:
    write_beir(tmp_path / "data" / "words")
    for number, forum in enumerate(FORUMS):
        folder = write_beir(tmp_path / "data" / "cqadupstack" / forum)
        if number % 2:
            (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    data = ["--data", tmp_path / "data" / "words", tmp_path / "data" / "cqadupstack"]
    found = evaluate(world, tmp_path / "out", *data, "--k", 10)
    means = [found["sets"][f"cqadupstack/{forum}"]["mean"]["ndcg@10"] for forum in FORUMS]
    assert means[0] != means[1]
    assert f"| CQADupStack | 126 | {np.mean(means):.4f} |" in found["out"]
    assert len(found["sets"]) == 13 and "| mean of 2 sets |" in found["out"]
    arguments = ["--model", world.model, "--data", "beir", "--out", tmp_path / "o", "--preflight"]
    outcome = command("evaluate", "beir", *arguments)
    assert outcome.code == 1 and "expected at least one set that is on disk, found none of msmarco" in outcome.err
    (tmp_path / "data" / "words").rename(tmp_path / "data" / "scifact")
    all_sets = evaluate(world, tmp_path / "all", "--data", "beir", "--home", tmp_path / "data", "--k", 10)
    assert all_sets["out"].count("not here") == 17 and len(all_sets["absent"]) == 17


def test_a_set_is_downloaded_by_name_and_evaluated(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served"
    write_beir(served / "scifact")
    shutil.make_archive(str(served / "scifact"), "zip", served, "scifact")
    md5 = hashlib.md5((served / "scifact.zip").read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(BY_NAME, "scifact", dataclasses.replace(BY_NAME["scifact"], md5=md5))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirror = f"http://127.0.0.1:{server.server_port}"
        arguments = ["--data", "scifact", "--home", tmp_path / "home", "--download", "--mirror", mirror]
        found = evaluate(world, tmp_path / "out", *arguments)
        server.shutdown()
    assert found["sets"]["scifact"]["queries"] == 20 and (tmp_path / "home" / "scifact").is_dir()
    assert "other number of passages than published: 1" in found["err"]


def test_preflight_encodes_nothing_and_prints_an_estimate(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["evaluate", "beir", "--model", world.model, "--data", world.beir, "--out", out, "--preflight"]
    outcome = command(*arguments)
    assert outcome.code == 0 and not out.exists() and not outcome.out
    assert "words (test): 20 passages, 20 queries, 27 judgements; 0 errors, 40 warnings" in outcome.err
    assert "queries judged in train too: 20" in outcome.err and "of encoding" in outcome.err
    found = json.loads(command(*arguments, "--json").out)["sets"]["words"]
    assert sum(found["tokens"]["document"].values()) == 20 and found["estimate"]["disk"] > 20 * 32 * 4
    for index in (["--factory", "auto"], ["--factory", "HNSW512"], ["--index", world.index]):
        with_index = json.loads(command(*arguments, "--json", *index).out)["sets"]["words"]["estimate"]
        assert with_index["memory"] >= found["estimate"]["memory"]
        assert with_index["disk"] > found["estimate"]["disk"]


def test_errors_in_any_set_are_named_before_anything_is_encoded(world: Any, tmp_path: Path) -> None:
    good, bad = write_beir(tmp_path / "good"), write_beir(tmp_path / "bad")
    with (bad / "corpus.jsonl").open("a") as stream:
        stream.write('{"_id": "d1", "text": "again"}\n{"_id": "d 2", "text": "x"}\n')
    out = tmp_path / "out"
    outcome = command("evaluate", "beir", "--model", world.model, "--data", good, bad, "--out", out)
    assert outcome.code == 1 and not out.exists()
    assert "corpus.jsonl:21: expected each passage id once" in outcome.err
    assert outcome.err.splitlines()[-1].endswith("(and 1 more errors in bad)")


def test_dangling_judgements_can_be_allowed(world: Any, tmp_path: Path) -> None:
    data = write_beir(tmp_path / "words")
    with (data / "qrels" / "test.tsv").open("a") as stream:
        stream.write("q1\tgone\t1\nghost\td1\t1\n")
    assert command("evaluate", "beir", "--model", world.model, "--data", data, "--out", tmp_path / "o").code == 1
    found = evaluate(world, tmp_path / "o", "--data", data, "--allow-dangling")["sets"]["words"]
    assert found["missing_queries"] == ["ghost"] and found["queries"] == 21


def test_an_index_is_compared_with_exact_search(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = evaluate(world, out, "--data", world.beir, "--factory", "Flat")
    assert found["sets"]["words"]["index"]["loss"]["ndcg@10"] == pytest.approx(0, abs=1e-9)
    assert "| words | Flat | " in found["out"] and "+0.0000 | 1.0000 at 20 |" in found["out"]
    built = (out / "words" / "index" / "index.faiss").stat().st_mtime_ns
    stored = (out / "words" / "embeddings" / "00000.npy").stat().st_mtime_ns
    lossy = evaluate(world, out, "--data", world.beir, "--index", world.index)["sets"]["words"]
    assert lossy["index"]["overlap@20"] == 1.0
    evaluate(world, out, "--data", world.beir, "--factory", "Flat")
    assert (out / "words" / "index" / "index.faiss").stat().st_mtime_ns == built
    assert (out / "words" / "embeddings" / "00000.npy").stat().st_mtime_ns == stored
    found = evaluate(world, out, "--data", world.beir, "--factory", "PQ4x4")["sets"]["words"]
    loss = found["mean"]["ndcg@10"] - found["index"]["mean"]["ndcg@10"]
    assert found["index"]["loss"]["ndcg@10"] == pytest.approx(loss, abs=1e-12) and abs(loss) > 1e-6
    again = evaluate(world, out, "--data", world.beir, "--factory", "auto")["sets"]["words"]
    assert again["index"]["factory"] == "Flat"  # the choice of "auto", not the index of the previous run


def test_json_has_the_losses_of_the_index_and_the_missing_sets(world: Any, tmp_path: Path) -> None:
    write_beir(tmp_path / "home" / "scifact")
    arguments = ["--model", world.model, "--data", "beir", "--home", tmp_path / "home", "--factory", "PQ4x4", "--json"]
    outcome = command("evaluate", "beir", *arguments, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    found, report = json.loads(outcome.out), json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["absent"] == report["absent"] and len(found["absent"]) == 18
    assert found["index"] == {"scifact": report["sets"]["scifact"]["index"]}
    exact, index = found["sets"]["scifact"]["mean"], found["index"]["scifact"]
    assert index["loss"]["ndcg@10"] == exact["ndcg@10"] - index["mean"]["ndcg@10"] != 0


def test_an_unsuitable_index_is_refused_before_the_corpus_is_encoded(world: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("words: {query_prompt: 'ask: '}\n")
    for arguments, message in (
        (["--index", tmp_path], "manifest.json"),
        (["--index", world.index, "--settings", prompts], "expected queries of the model that embedded its passages"),
        (["--index", world.index, "--data", world.beir, write_beir(tmp_path / "other")], "expected one set to go with"),
        (["--factory", "Nonsense"], "factory 'Nonsense': expected a faiss factory string"),
        (["--factory", "IVF99999,Flat"], "words: factory 'IVF99999,Flat': expected at least 99,999 passages to train"),
        (["--factory", "IVF2,PQ8"], "words: factory 'IVF2,PQ8': expected at least 256 passages to train"),
        (["--factory", "OPQ8,PQ8", "--preflight"], "expected at least 256 passages"),
    ):
        out = tmp_path / "out"
        model_and_data = ["--model", world.model, "--out", out, "--data", world.beir]
        outcome = command("evaluate", "beir", *model_and_data, *arguments)
        assert outcome.code == 1 and message in outcome.err, outcome.err
        assert not out.exists()


@pytest.mark.parametrize("out", ["sets/words", "sets/words/report", "sets", "sets/other/../words/deep/er"])
def test_a_report_inside_a_set_is_refused(world: Any, tmp_path: Path, out: str) -> None:
    data = write_beir(tmp_path / "sets" / "words")
    (tmp_path / "sets" / "other").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for subcommand in (["beir", "--model", world.model], ["compare", "--bm25"]):
        outcome = command("evaluate", *subcommand, "--data", data, "--out", tmp_path / out)
        assert outcome.code == 2 and outcome.err.count("\n") == 1
        expected = f"--out: expected a folder outside the sets, found {tmp_path / out}, which writes into {data}"
        assert expected in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_reports_state_what_is_needed_to_reproduce_them(world: Any, towers: Towers, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", world.beir, "--precision", "fp32", "--k", 7, "--factory", "IVF2,Flat"]
    details = evaluate(world, out, *arguments)["details"]
    files = {part: world.beir / f"{name}" for part, name in (("corpus", "corpus.jsonl"), ("queries", "queries.jsonl"))}
    files["qrels"] = world.beir / "qrels" / "test.tsv"
    sums = {f"{part} sha256": hashlib.sha256(path.read_bytes()).hexdigest() for part, path in files.items()}
    assert details["data"] == {"words": sums} and details["model sha256"] == towers.fingerprint()["sha256"]
    assert (details["split"], details["precision"], details["vectors"]) == ("test", "fp32", "float32")
    assert details["search"].endswith("7 passages per query") and details["device"].startswith("cpu (")
    index = details["index"]["words"]
    assert (index["factory"], index["seed"], index["trained_on"], index["nprobe"]) == ("IVF2,Flat", 0, 20, 2)
    assert {"Python", "dense-retriever", "torch", "transformers", "sentence-transformers"} < details["versions"].keys()
    assert "unknown" not in details["versions"].values()
    page = (out / "report.html").read_text()
    assert all(f"<dd>{value}</dd>" in page for value in (*sums.values(), *details["versions"].values()))
    found = evaluate(world, tmp_path / "plain", "--data", world.beir, "--k", 7)
    # The cut-offs are the default ones and the depth of the run.
    assert "| data | nDCG@7 | recall@7 | MRR@7 | MAP@7 | precision@7 |" in found["out"]
    assert [name for name in found["sets"]["words"]["mean"] if "ndcg" in name] == [f"ndcg@{k}" for k in (1, 3, 5, 7)]
    details = found["details"]
    assert "index" not in details and details["seed"] == "none: nothing is drawn at random"


def test_training_and_the_command_measure_the_same_on_dev(world: Any, tiny: Any, tmp_path: Path) -> None:
    data = write_beir(tmp_path / "words")
    for precision in ("fp32", "bf16"):
        run = tmp_path / precision
        config = {"dev": {"path": str(data), "split": "dev", "every": 2}, "steps": 4, "precision": precision}
        trained = command(
            "train", write_config(tmp_path / f"{precision}.yaml", tiny, world.pairs, out=str(run), **config)
        )
        assert trained.code == 0, trained.err
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        best = max((row for row in rows if "dev_ndcg@10" in row), key=lambda row: row["dev_ndcg@10"])
        arguments = ["--model", run / "model", "--data", data, "--split", "dev", "--precision", precision]
        outcome = command("evaluate", "beir", *arguments, "--out", run / "report", "--json")
        assert outcome.code == 0, outcome.err
        mean = json.loads(outcome.out)["sets"]["words"]["mean"]
        logged = {name.removeprefix("dev_"): value for name, value in best.items() if name.startswith("dev_")}
        logged = {name: value for name, value in logged.items() if not name.endswith(("_low", "_high"))}
        assert {name: mean[name] for name in logged} == pytest.approx(logged, abs=1e-12)
        assert "ndcg@10" in logged and 0 < logged["ndcg@10"] < 1


def long_documents(folder: Path) -> Path:
    """A set of documents whose relevant words are at the end, beyond the model's maximum length."""
    words = list(MEANINGS)
    filler = "there is nothing of interest in here " * 4
    rows = [{"_id": f"d{i}", "title": w, "text": f"{filler} {w} {MEANINGS[w]}"} for i, w in enumerate(words)]
    rows[3]["text"] = "short"
    write_lines(folder / "corpus.jsonl", list(rows))
    write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": MEANINGS[w]} for i, w in enumerate(words)])
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(20))
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


def test_windows_find_text_at_the_end_of_long_documents(world: Any, towers: Towers, tmp_path: Path) -> None:
    data = long_documents(tmp_path / "long")
    arguments = ["--data", data, "--k", 20]
    truncated = evaluate(world, tmp_path / "out", *arguments)["sets"]["long"]
    windows = evaluate(world, tmp_path / "out", *arguments, "--windows", "--overlap", 20)["sets"]["long"]
    # The tokens of this model are letters, so that a window is a few words.
    assert windows["mean"]["ndcg@10"] > truncated["mean"]["ndcg@10"] + 0.1
    store = EmbeddingStore.open(tmp_path / "out" / "long" / "windows")
    run = read_trec_run(tmp_path / "out" / "long" / "run.trec")
    vectors, ids = store.vectors(), [id_.rpartition("\u241f")[0] for id_ in store.ids()]
    query = embed_texts(towers, [MEANINGS["cat"]], "query", EncodeOptions())[0]
    best = {d: max(float(v @ query) for v, i in zip(vectors, ids, strict=True) if i == d) for d in set(ids)}
    assert run["q0"] == pytest.approx(best, abs=1e-6) and len(best) == 20 < store.rows


def test_windows_cover_every_token_and_overlap(towers: Towers, tmp_path: Path) -> None:
    passages = list(BeirDataset.open(long_documents(tmp_path / "long")).passages())
    limit = towers.tokenizer("document").max_length
    for passage in passages:
        windows = list(split_documents(towers, [passage], overlap=8))
        assert all(len(towers.tokenizer("document")([w.content]).ids) <= limit for w in windows)
        assert all(window.title == passage.title for window in windows)
        rest = passage.text
        for window in windows:
            start = rest.index(window.text)
            assert start <= max(0, len(passage.text) - 8)
            rest = rest[start:]
        assert rest == windows[-1].text
    short = next(split_documents(towers, [passages[3]], overlap=0))
    assert (short.id, short.text) == ("d3\u241f0", "short")
    with pytest.raises(InputError, match="expected an overlap from 0 to"):
        next(split_documents(towers, passages, overlap=40))


def test_prompts_and_lengths_can_differ_by_set(world: Any, towers: Towers, tmp_path: Path) -> None:
    settings = {
        "default": {"query_prompt": "ask: ", "passage_max_length": 12},
        "other": {"passage_prompt": "text: ", "query_max_length": 9},
        "othre": {"passage_prompt": "never used"},
    }
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    data = [write_beir(tmp_path / "words"), write_beir(tmp_path / "other")]
    found = evaluate(world, tmp_path / "out", "--data", *data, "--settings", path)
    assert f"warning: {path}: no set here is called othre" in found["err"] and found["err"].count("is called") == 1
    texts = [passage.content for passage in BeirDataset.open(data[0]).passages()]
    for name, prompt, length in (("words", "", 12), ("other", "text: ", 64)):
        store = EmbeddingStore.open(tmp_path / "out" / name / "embeddings")
        tokens = towers.tokenizer("document").tokenizer([prompt + t for t in texts], truncation=True, max_length=length)
        adjusted = AdjustedTowers(towers, SetSettings(**settings["default" if name == "words" else name]))
        lengths = adjusted.tokenizer("document")([prompt + text for text in texts]).lengths
        assert [len(ids) for ids in tokens["input_ids"]] == lengths.tolist()
        expected = embed_texts(adjusted, texts, "document", EncodeOptions())
        np.testing.assert_allclose(store.vectors(), expected, atol=1e-6)
        assert store.model != towers.fingerprint()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words: {query_promt: x}", r"words: expected query_prompt.* did you mean query_prompt\?"),
        ("words: {query_max_length: long}", "query_max_length: expected a number above 0, found 'long'"),
        ("words: {passage_prompt: 3}", "passage_prompt: expected text, found 3"),
        ("- words", "expected names of sets"),
        ("{", "expected YAML"),
    ],
)
def test_invalid_settings_are_one_line_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path / "s.yaml")


def test_a_length_above_that_of_the_model_is_refused(towers: Towers) -> None:
    with pytest.raises(InputError, match="query length: expected at most 64"):
        AdjustedTowers(towers, SetSettings(query_max_length=65))
    with pytest.raises(InputError, match="expected fewer than 8 tokens"):
        AdjustedTowers(towers, SetSettings(query_prompt="ask " * 8, query_max_length=8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--download"], "--download: expected home"),
        (["--factory", "Flat", "--index", "i"], "--factory: give a factory string or an index"),
        (["--overlap", "-1"], "--overlap: expected"),
    ],
)
def test_invalid_flags_are_one_line_errors(arguments: list[str], message: str) -> None:
    outcome = command("evaluate", "beir", "--model", "m", "--data", "d", "--out", "o", *arguments)
    assert outcome.code == 2 and message in outcome.err
