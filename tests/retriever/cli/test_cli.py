"""The commands work from end to end, and what one says the next one says too."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cli_helpers import MEANINGS, command, write_beir, write_config, write_lines

import retriever
from eval.runs import read_trec_run
from index.ann.index import Index
from index.store.reader import EmbeddingStore
from retriever.config.model import ModelConfig
from retriever.encoding.encoder import EncodeOptions
from retriever.models.modality import load_towers
from retriever.searching.search import search

ROOT = Path(__file__).resolve().parents[3]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the project as an installed one would."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def report(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    outcome = command("evaluate", "beir", "--model", world.model, "--data", world.beir, "--out", out)
    assert outcome.code == 0, outcome.err
    return out


def test_run_folder_holds_what_the_contract_names(world: Any) -> None:
    assert {path.name for path in world.run.iterdir()} >= {"config.yaml", "metrics.jsonl", "checkpoints", "model"}
    steps = [json.loads(line)["step"] for line in (world.run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 11]


def test_sentence_transformers_gives_the_stored_vectors(world: Any) -> None:
    from sentence_transformers import SentenceTransformer

    store = EmbeddingStore.open(world.embeddings)
    texts = [f"{word} {meaning}" for word, meaning in MEANINGS.items()]
    vectors = SentenceTransformer(str(world.model), device="cpu").encode_document(texts)
    assert list(store.ids()) == [f"d{i}" for i in range(20)]
    np.testing.assert_allclose(store.vectors(), vectors, atol=1e-5)


def test_search_finds_what_evaluate_finds(world: Any, report: Path) -> None:
    queries = world.beir / "queries.jsonl"
    outcome = command(
        "search", "--model", world.model, "--index", world.index, "--queries", queries, "--k", 20, "--json"
    )
    assert outcome.code == 0, outcome.err
    answers = [json.loads(line) for line in outcome.out.splitlines()]
    run = read_trec_run(report / "words" / "run.trec")
    assert [answer["id"] for answer in answers] == list(run)
    for answer in answers:
        found = {result["id"]: result["score"] for result in answer["results"]}
        assert found == pytest.approx(run[answer["id"]], abs=1e-5)
        assert [result["rank"] for result in answer["results"]] == list(range(1, 21))
        first = answer["results"][0]
        assert first["text"] == MEANINGS[first["title"]]


def test_beir_package_gives_our_numbers(world: Any, report: Path) -> None:
    from beir.datasets.data_loader import GenericDataLoader
    from beir.retrieval import models
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    corpus, queries, qrels = GenericDataLoader(str(world.beir)).load("test")
    search = DenseRetrievalExactSearch(models.SentenceBERT(str(world.model)), batch_size=32)
    found = EvaluateRetrieval(search, score_function="dot", k_values=[10]).retrieve(corpus, queries)
    ndcg, mean_precision, recall, precision = EvaluateRetrieval.evaluate(qrels, found, [10])
    outcome = command("evaluate", "beir", "--model", world.model, "--data", world.beir, "--out", report, "--json")
    ours = json.loads(outcome.out)["sets"]["words"]["mean"]
    assert 0.2 < ours["ndcg@10"] < 0.999  # neither failing nor trivial
    theirs = {**ndcg, **mean_precision, **recall, **precision}
    for name, key in (("NDCG", "ndcg"), ("MAP", "map"), ("Recall", "recall"), ("P", "precision")):
        assert ours[f"{key}@10"] == pytest.approx(theirs[f"{name}@10"], abs=5e-5)


def test_evaluate_reuses_the_embeddings_it_finds(world: Any, report: Path) -> None:
    shard = report / "words" / "embeddings" / "00000.npy"
    before = shard.stat().st_mtime_ns
    outcome = command("evaluate", "beir", "--model", world.model, "--data", world.beir, "--out", report)
    assert outcome.code == 0 and shard.stat().st_mtime_ns == before
    assert outcome.out.startswith("| data | nDCG@10 |") and "| words |" in outcome.out
    saved = json.loads((report / "report.json").read_text())
    assert "words" in json.dumps(saved) and (report / "report.md").exists()


@pytest.mark.parametrize("how", ["arguments", "file", "stdin"])
def test_queries_come_from_arguments_a_file_or_standard_input(world: Any, tmp_path: Path, how: str) -> None:
    texts = ["define cat", "what is snow?"]
    given: tuple[object, ...] = tuple(texts)
    if how != "arguments":
        given = ()
    if how == "file":
        given = ("--queries", write_lines(tmp_path / "q.jsonl", [{"id": i, "text": t} for i, t in enumerate(texts, 1)]))
    stdin = "define cat\n\nwhat is snow?" if how == "stdin" else ""
    place = ("search", "--model", world.model, "--index", world.index, "--k", 3)
    answers = [json.loads(line) for line in command(*place, *given, "--json", stdin=stdin).out.splitlines()]
    assert [(answer["id"], answer["query"], len(answer["results"])) for answer in answers] == [
        ("1", "define cat", 3),
        # A number is that of the line.
        ("3" if how == "stdin" else "2", "what is snow?", 3),
    ]
    table = command(*place, *given, stdin=stdin).out
    assert "define cat" in table and answers[1]["results"][2]["id"] in table


def test_elsewhere_than_on_a_terminal_results_are_fields_between_tabs(world: Any) -> None:
    place = ("search", "--model", world.model, "--index", world.index, "--k", 3, "define  cat", "a\x1b[1m\ttree")
    answers = [json.loads(line) for line in command(*place, "--json").out.splitlines()]
    lines = command(*place).out.splitlines()
    assert [line for line in lines if "\t" not in line] == ["define cat", "a\\x1b[1m tree"]
    fields = [line.split("\t") for line in lines if "\t" in line]
    results = [result for answer in answers for result in answer["results"]]
    assert fields == [
        [str(r["rank"]), f"{r['score']:.4f}", r["id"], " ".join(f"{r['title']} {r['text']}".split())] for r in results
    ]
    assert [line[:1] for line in lines] == ["d", "1", "2", "3", "a", "1", "2", "3"]


def test_long_and_odd_passages_are_whole_fields_and_a_title_comes_once(world: Any, tmp_path: Path) -> None:
    texts = {"long": "word " * 300 + "end", "odd": "a\tb\nc\x07d", "twice": "the same  title"}
    titles = {"twice": "the same title"}
    rows: list[object] = [{"_id": i, "title": titles.get(i, ""), "text": text} for i, text in texts.items()]
    write_lines(tmp_path / "c.jsonl", rows)
    place = ("--model", world.model)
    assert command("encode", *place, "--data", tmp_path / "c.jsonl", "--out", tmp_path / "e").code == 0
    assert command("index", "build", "--embeddings", tmp_path / "e", "--out", tmp_path / "i").code == 0
    outcome = command("search", *place, "--index", tmp_path / "i", "q")
    found = dict(line.split("\t")[2:] for line in outcome.out.splitlines()[1:])
    assert found == {"long": texts["long"], "odd": "a b c\\x07d", "twice": "the same title"}


def test_typed_query_is_answered_before_the_next_is_read(world: Any) -> None:
    read: list[str] = []

    def typed() -> Iterator[tuple[str, str]]:
        for name in "abc":
            read.append(name)
            yield name, f"what is a {name}?"

    towers, index = load_towers(str(world.model)), Index.open(world.index)
    answers = search(towers, index, typed(), k=2, options=EncodeOptions(), batch=1)
    assert next(answers).id == "a" and read == ["a"]
    assert [answer.id for answer in answers] == ["b", "c"]


def test_every_index_answers_as_flat_does_when_it_looks_everywhere(world: Any, tmp_path: Path) -> None:
    answers = []
    for factory in ("Flat", "IVF2,Flat", "HNSW8"):
        built = command(
            "index", "build", "--embeddings", world.embeddings, "--out", tmp_path / "i", "--factory", factory, "--json"
        )
        summary = json.loads(built.out)
        assert summary == {"index": str(tmp_path / "i"), "factory": factory, "rows": 20, "dim": 32}
        found = command("search", "--model", world.model, "--index", tmp_path / "i", "--k", 5, "--json", "define oak")
        answers.append([result["id"] for result in json.loads(found.out)["results"]])
    assert answers[0] == answers[1] == answers[2]


def test_verify_accepts_whole_folders_and_names_the_file_with_a_flipped_byte(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "index"
    assert command("index", "build", "--embeddings", world.embeddings, "--out", out).code == 0
    whole = command("index", "verify", out, "--json")
    assert whole.code == 0 and json.loads(whole.out)["rows"] == 20
    for name in sorted(path.name for path in out.iterdir()):
        path = out / name
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        broken = command("index", "verify", out)
        assert broken.code == 1 and broken.err.startswith(f"retriever: {path}"), broken.err
        path.write_bytes(content)
    assert command("index", "verify", out).code == 0


def test_flags_override_the_file_wherever_it_stands(world: Any, tmp_path: Path) -> None:
    for number, arguments in enumerate([("--steps", 1, world.config), (world.config, "--steps", 1)]):
        out = tmp_path / str(number)
        of_source = ("--data.sources.0.weight", 2.5, "--data.sources.0.loss.limit.share", 0.97)
        outcome = command("train", *arguments, "--out", out, *of_source)
        assert outcome.code == 0, outcome.err
        saved = (out / "config.yaml").read_text()
        assert (
            "steps: 1\n" in saved and "weight: 2.5" in saved and "query: question" in saved and "share: 0.97" in saved
        )


def test_training_from_a_beir_folder_keeps_the_best_model(world: Any, tmp_path: Path, tiny: ModelConfig) -> None:
    beir = write_beir(tmp_path / "words")
    config = write_config(
        tmp_path / "run.yaml",
        tiny,
        beir,
        data={"sources": [{"path": str(beir)}], "workers": 0},
        dev={"path": str(beir), "every": 2},
        steps=3,
    )
    outcome = command("train", config)
    assert outcome.code == 0, outcome.err
    assert "step 2  dev nDCG@10" in outcome.err and "step 3  dev nDCG@10" in outcome.err
    assert (tmp_path / "run" / "model" / "modules.json").exists()


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        result = python("-X", "importtime", "-m", "retriever", "--help")
        seconds.append(time.perf_counter() - begin)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "train" in result.stdout
    assert "retriever" in imported
    assert not imported & {"torch", "transformers", "sentence_transformers", "faiss", "numpy", "datasets", "pyarrow"}
    assert min(seconds) < 1


@pytest.mark.parametrize("words", [[], ["train"], ["encode"], ["index", "build"], ["index", "verify"], ["search"]])
def test_every_command_explains_itself(words: list[str]) -> None:
    outcome = command(*words, "--help")
    assert outcome.code == 0 and outcome.out.startswith("usage: retriever") and not outcome.err


def test_version_is_told_at_once() -> None:
    result = python("-X", "importtime", "-m", "retriever", "--version")
    assert (result.returncode, result.stdout) == (0, f"retriever {retriever.__version__}\n")
    assert "transformers" not in result.stderr and "| torch" not in result.stderr
    assert "version = attr: retriever.utils.versions.__version__" in (ROOT / "setup.cfg").read_text()


def disturbed_at_step_3(arguments: list[str], disturb: Callable[[int], None]) -> list[str]:
    """What a run of training, which fails, says; `disturb` is given its process, the first of a group."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        # More steps than can pass before it is disturbed.
        [sys.executable, "-m", "retriever", "train", *arguments, "--epochs", "400", "--log-every", "1"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step 3/"):
            disturb(process.pid)
    assert process.wait(timeout=60) == 1, "".join(said)
    return said


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 0)])
def test_signalled_run_saves_a_checkpoint_and_says_how_to_go_on(
    world: Any, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    out = tmp_path / "run"
    arguments = [str(world.config), "--out", str(out), "--data.workers", str(workers)]
    # To the whole group, as a terminal sends Ctrl-C; a batch system does the same with SIGTERM.
    said = disturbed_at_step_3(arguments, lambda process: os.killpg(process, number))
    assert said[-1].startswith(f"{number.name} at step "), "".join(said)
    assert not any("Traceback" in line or "Warning" in line for line in said), "".join(said)
    step = int(said[-1].split("step ")[1].split(":")[0])
    assert (out / "checkpoints" / f"step-{step:08d}").is_dir()
    assert f"retriever train --resume {out}" in said[-1]


def test_a_data_worker_that_is_killed_ends_the_run_with_one_line(world: Any, tmp_path: Path) -> None:
    def kill_worker(process: int) -> None:
        for child in psutil.Process(process).children():
            child.kill()

    said = disturbed_at_step_3([str(world.config), "--out", str(tmp_path / "run"), "--data.workers", "1"], kill_worker)
    assert said[-1] == "retriever: a process that loads data was killed, probably because memory ran out\n", "".join(
        said
    )
    assert not any("Traceback" in line for line in said), "".join(said)


def test_answers_go_to_standard_output_while_bars_are_drawn(world: Any, tmp_path: Path) -> None:
    terminal, errors = pty.openpty()
    fcntl.ioctl(errors, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    code = (
        "import sys; from retriever.cli.command_line import main; "
        f"main(['encode', '--model', {str(world.model)!r}, '--data', {str(world.beir)!r}, '--out', 'e', '--json']); "
        f"sys.exit(main(['search', '--model', {str(world.model)!r}, '--index', {str(world.index)!r}, '--json', 'oak']))"
    )
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=out,
            stderr=errors,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        )
        os.close(errors)
        screen = b""
        while True:
            try:
                screen += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        assert process.wait(timeout=60) == 0, screen
    summary, answer = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert summary["rows"] == 20 and len(answer["results"]) == 10
    assert b"encode corpus.jsonl" in screen and b"/20" in screen


def test_mined_negatives_train_the_next_run(world: Any, tiny: ModelConfig, tmp_path: Path) -> None:
    out = tmp_path / "hard.jsonl"
    mine = ("mine", "--model", world.model, "--data", world.beir, "--out", out, "--max-share", "1", "--json")
    # The embeddings made by `retriever encode` serve.
    outcome = command(*mine, "--negatives", "3", "--embeddings", world.embeddings)
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert answer["queries"] == len(rows) > 10
    assert max(len(row["negatives"]) for row in rows) == 3
    assert all(not set(row["negatives"]) & set(row["positive"]) for row in rows)
    config = write_config(tmp_path / "run.yaml", tiny, out)
    run = tmp_path / "run"
    columns = ("--data.sources.0.query", "query", "--data.sources.0.positive", "positive")
    outcome = command("train", config, "--out", run, *columns, "--data.sources.0.negatives", "negatives")
    assert outcome.code == 0, outcome.err


def test_lines_of_a_help_text_are_filled() -> None:
    rows = command("train", "--help").out.splitlines()
    start = next(i for i, row in enumerate(rows) if "--batch-size INT" in row)
    text = [row.strip("│ ") for row in rows[start + 1 : start + 4]]
    room = len(rows[start].strip("│")) - 8
    # A row ends where the next word has no room.
    assert all(len(row) + 1 + len(after.split()[0]) > room for row, after in itertools.pairwise(text)), text
