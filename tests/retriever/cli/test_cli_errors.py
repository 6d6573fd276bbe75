"""A user's mistake gets one line that says where and what, the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import Outcome, World, assert_refused, command, disk_of, write_beir, write_lines

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        ([], ["train, encode, index, search"]),
        (["trian"], ["trian", "train, encode"]),
        (["index"], ["build"]),
        (["evaluate"], ["beir"]),
        (["encode", "--model", "m", "--data", "d"], ["--out"]),
        (["encode", "--modle", "m", "--data", "d", "--out", "o"], ["--model"]),
        (
            ["encode", "--model", "m", "--data", "d", "--out", "o", "--shard-rows", "0"],
            ["^retriever: --shard-rows", "0"],
        ),
        (["encode", "--model", "m", "--data", "d", "--out", "o", "--dtype", "int3"], ["--dtype", "int3", "float16"]),
        (
            ["encode", "--model", "m", "--data", "d", "--out", "o", "--micro-batch-tokens", "-1"],
            ["--micro-batch", "-1"],
        ),
        (["search", "--model", "m", "--index", "i", "--k", "ten", "q"], ["--k: expected a whole number, found 'ten'"]),
        (
            ["search", "--model", "m", "--index", "i", "--k", "0", "q"],
            ["^retriever: --k: expected at least 1, found 0"],
        ),
        (["search", "--model", "m", "--index", "i", "--queries", "f", "q"], ["--queries", "not both"]),
        (
            ["search", "--model", "m", "--index", "i", "a", os.fsdecode(b"b\xff")],
            ["^retriever: query:2: expected UTF-8, found byte 0xff"],
        ),
        (["search", "--model", "m", "--index", "i", "a", " "], ["^retriever: query:2: expected text, found none"]),
        (["mine", "--model", "m", "--data", "d", "--out", "o.gz"], ["^retriever: --out: .* .jsonl file, found o.gz"]),
        (
            ["encode", "--model", "m", "--data", str(ROOT / "README.md"), "--out", "o", "--device", "tpu"],
            ["^retriever: --device: expected auto, cpu, cuda.*, found 'tpu'"],
        ),
        (
            ["evaluate", "beir", "--model", "m", "--data", "d", "--out", "o", "--k", "0"],
            ["^retriever: --k: .* found 0"],
        ),
        (["evaluate", "beir", "--model", "m", "--data", "--out", "o"], ["--data", "at least one"]),
        (["train", "--batch-sise", "4"], ["--batch-sise", r"did you mean --batch-size\?"]),
        (["train", "--optim.lr", "fast"], ["--optim.lr: expected a number, found 'fast'"]),
        (["train", "--optim.lr", "-1"], ["^retriever: optim.lr: expected a positive number, found -1"]),
        (["train", "--loss.name", "clop"], ["loss.name", "clop", "inf_cl"]),
        (["train", "--seed", "-1"], ["seed: expected at least 0, found -1"]),
        (["train", "--seed", str(2**64)], [r"seed: expected a number below 2\^64, found 18446744073709551616"]),
        (["train", "--batch-size", "1"], ["batch_size: expected at least 2, or data.negatives, found 1"]),
        (["train", "--optim.max-grad-norm", "few"], ["max-grad-norm: expected FLOAT or none, found 'few'$"]),
        (["train", "--dry-run", "--profile"], ["--profile: expected without --dry-run"]),
        (["train", "--data.workers", "-1"], ["data.workers", "-1"]),
        (["train", "--data.negatives", "-1"], ["data.negatives", "-1"]),
        (["train", "--model.max-length", "0"], ["model.max_length", "found 0"]),
        (["train", "--model.dropout", "1.5"], ["model.dropout", "found 1.5"]),
        (["train", "--epochs", "nan"], ["epochs", "nan"]),
        (["train", "--steps", "2", "run"], ["^retriever: run: .*before any flag"]),
        (["train", "nothing.yaml"], ["nothing.yaml: no such file"]),
        (["train", "--resume", "somewhere", "--steps", "4"], ["--resume"]),
    ],
)
def test_bad_arguments_end_with_2_and_one_line(arguments: list[str], patterns: list[str]) -> None:
    outcome = command(*arguments)
    assert_refused(outcome, 2, *patterns)
    assert len(outcome.err.splitlines()) == 1


def _append(path: Path, row: object) -> None:
    with path.open("a") as stream:
        stream.write((row if isinstance(row, str) else json.dumps(row)) + "\n")


@pytest.mark.parametrize(
    ("file", "row", "patterns"),
    [
        ("qrels/test.tsv", "q1\tghost\t1", [r"qrels/test\.tsv:29: expected passage ids of the corpus, found ghost"]),
        ("qrels/test.tsv", "ghost\td1\t1", [r"qrels/test\.tsv:29: expected ids of queries\.jsonl, found ghost"]),
        ("qrels/test.tsv", "q1\td2\tmuch", [r"qrels/test\.tsv:29: expected a whole number as grade, found 'much'"]),
        ("qrels/test.tsv", "q1\td2", [r"qrels/test\.tsv:29: expected 3 columns, found 2"]),
        (
            "queries.jsonl",
            {"_id": "q1", "text": "again"},
            [r"queries\.jsonl:21: expected each query id once, found q1"],
        ),
        ("queries.jsonl", {"_id": "q99", "text": ""}, [r"queries\.jsonl:21: expected text for query q99"]),
        (
            "corpus.jsonl",
            {"_id": "d1", "text": "again"},
            [r"corpus\.jsonl:21: expected each passage id once, found d1"],
        ),
        ("corpus.jsonl", {"_id": "d 1", "text": "blank"}, [r"corpus\.jsonl:21: expected an id without white space"]),
        ("corpus.jsonl", {"text": "no id"}, [r"corpus\.jsonl:21: expected a column '_id' or 'id', found text"]),
        ("corpus.jsonl", '{"_id": "d99", ', [r"corpus\.jsonl:21: expected JSON"]),
    ],
)
def test_broken_beir_folder_is_refused_and_leaves_no_report(
    world: Any, tmp_path: Path, file: str, row: object, patterns: list[str]
) -> None:
    folder = write_beir(tmp_path / "words")
    _append(folder / file, row)
    out = tmp_path / "report"
    outcome = command("evaluate", "beir", "--model", world.model, "--data", folder, "--out", out)
    assert_refused(outcome, 1, *patterns)
    assert not (out / "report.json").exists() and not (out / "words" / "run.trec").exists()


def test_broken_corpus_leaves_no_store_that_index_would_take(world: Any, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [{"_id": "a", "text": "b"}, {"_id": "a", "text": "c"}])
    out = tmp_path / "e"
    outcome = command("encode", "--model", world.model, "--data", corpus, "--out", out)
    assert_refused(outcome, 1, "expected unique ids, found 'a' in rows 0 and 1")
    assert_refused(command("index", "build", "--embeddings", out, "--out", tmp_path / "i"), 1, "incomplete")
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    ("name", "content", "patterns"),
    [
        ("gone.jsonl", None, [r"gone\.jsonl: [Nn]o such file"]),
        ("c.txt", b"text", [r"c\.txt: expected a file ending in \.jsonl"]),
        ("c.jsonl", b'{"_id": "a", "text": "\xff"}\n', [r"c\.jsonl:1: expected UTF-8, found byte 0xff"]),
        ("c.jsonl.gz", gzip.compress(b'{"_id": "a", "text": "b"}\n' * 999)[:-20], [r"c\.jsonl\.gz: cannot be read"]),
        ("c.csv", b"id,text\n1,a,b\n", [r"c\.csv:2: expected 2 columns, found 3"]),
        ("c.parquet", b"PAR1 not", [r"c\.parquet: cannot be read as Parquet"]),
    ],
    ids=["gone", "txt", "jsonl", "gz", "csv", "parquet"],
)
def test_unreadable_corpus(world: Any, tmp_path: Path, name: str, content: bytes | None, patterns: list[str]) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    outcome = command("encode", "--model", world.model, "--data", path, "--out", tmp_path / "e")
    assert_refused(outcome, 1, *patterns)


def test_missing_folders_and_splits(world: Any, tmp_path: Path) -> None:
    model, gone = world.model, tmp_path / "gone"
    evaluate = ("evaluate", "beir", "--out", tmp_path / "r", "--model", model)
    assert_refused(command(*evaluate, "--data", gone), 1, f"{gone}: no such folder")
    assert_refused(command(*evaluate, "--data", world.beir, "--split", "nope"), 1, r"qrels/nope\.tsv")
    assert_refused(command("encode", "--model", model, "--data", tmp_path, "--out", gone), 1, r"corpus\.jsonl")
    assert_refused(command("index", "build", "--embeddings", gone, "--out", tmp_path / "i"), 1, str(gone))
    assert_refused(command("index", "verify", gone), 1, str(gone))
    assert_refused(command("search", "--model", model, "--index", gone, "q"), 1, str(gone))
    assert_refused(command("train", "--resume", gone), 1, str(gone), r"config\.yaml")


def test_model_folders_that_are_none(world: Any, tmp_path: Path) -> None:
    corpus = world.beir / "corpus.jsonl"

    def encoded(model: object) -> Outcome:
        return command("encode", "--model", model, "--data", corpus, "--out", tmp_path / "e")

    assert_refused(encoded(tmp_path / "gone"), 1, "gone: no such model folder")
    assert_refused(encoded(world.beir), 1, f"{world.beir}: expected a model folder")
    without = tmp_path / "without"
    shutil.copytree(world.model, without)
    (without / "tokenizer.json").unlink()
    assert_refused(encoded(without), 1, "without: .*no tokenizer")
    assert not (tmp_path / "e").exists()


def test_model_with_torn_weights(world: Any, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(world.model, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(
        command("encode", "--model", torn, "--data", world.beir, "--out", tmp_path / "e"), 1, "torn: cannot be loaded"
    )
    assert not (tmp_path / "e").exists()


def test_search_refuses_another_model_than_the_index_was_made_with(world: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.model, other)
    settings = json.loads((other / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "query: "}
    (other / "config_sentence_transformers.json").write_text(json.dumps(settings))
    outcome = command("search", "--model", other, "--index", world.index, "what is a cat?")
    assert_refused(outcome, 1, f"{world.index}: expected queries of the model that embedded its passages")
    assert not outcome.out


def test_queries_of_standard_input_that_are_no_text(world: Any) -> None:
    words = ("search", "--model", world.model, "--index", world.index, "--json")
    outcome = command(*words, stdin="an oak\n" + os.fsdecode(b"caf\xe9\n"))
    assert_refused(outcome, 1, "standard input:2: expected UTF-8, found byte 0xe9")
    assert [json.loads(line)["query"] for line in command(*words, stdin="café\n").out.splitlines()] == ["café"]


def test_ids_to_delete_that_are_no_text(world: Any, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes(b"p1\n\xff\xfe\n")
    outcome = command("index", "delete", world.index, "--ids-file", tmp_path / "ids.txt")
    assert_refused(outcome, 1, "ids.txt:2: expected UTF-8, found byte 0xff")


def test_an_index_of_another_corpus_is_not_evaluated(world: Any, tmp_path: Path) -> None:
    shutil.copytree(world.beir, tmp_path / "larger")
    with (tmp_path / "larger" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "more", "text": "a passage"}\n')
    words = ("--data", tmp_path / "larger", "--out", tmp_path / "o", "--index", world.index)
    outcome = command("evaluate", "beir", "--model", world.model, *words)
    assert_refused(outcome, 1, f"{world.index}: expected an index of larger, 21 rows, found 20")


def test_damage_is_found_before_searching_where_it_is_asked_for(world: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(world.index, damaged)
    text = (damaged / "passages.jsonl").read_text()
    (damaged / "passages.jsonl").write_text(text.replace("acorns", "apples"))
    words = ("--model", world.model, "--index", damaged)
    assert "apples" in command("search", *words, "tree with acorns").out
    for asked in (("search", *words, "--verify", "an oak"), ("serve", *words, "--verify", "--port", 0)):
        assert_refused(command(*asked), 1, r"damaged/passages\.jsonl: .*sha256")
    assert command("search", "--model", world.model, "--index", world.index, "--verify", "an oak").code == 0


@pytest.mark.parametrize(
    ("factory", "patterns"),
    [
        ("IVF100,Flat", ["IVF100,Flat", "100 vectors", "found 20"]),
        ("Bogus", ["'Bogus': expected a faiss factory string"]),
        ("", ["expected a faiss factory string"]),
        ("IVF0,Flat", ["expected a faiss factory string"]),
        ("PQ5", ["PQ5"]),
    ],
)
def test_factories_that_cannot_be(world: Any, tmp_path: Path, factory: str, patterns: list[str]) -> None:
    out = tmp_path / "i"
    outcome = command("index", "build", "--embeddings", world.embeddings, "--out", out, f"--factory={factory}")
    assert_refused(outcome, 1, *patterns)
    assert not out.exists() and not list(tmp_path.iterdir())


def test_stores_and_indexes_are_not_taken_for_each_other(world: Any, tmp_path: Path) -> None:
    build = command("index", "build", "--embeddings", world.index, "--out", tmp_path / "i")
    assert_refused(build, 1, "expected an embedding store, found an index")
    search = command("search", "--model", world.model, "--index", world.embeddings, "q")
    assert_refused(search, 1, "expected an index, found an embedding store")


def test_folders_that_hold_something_else_are_left_alone(world: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("the only copy")
    encode = command("encode", "--model", world.model, "--data", world.beir, "--out", mine)
    assert_refused(encode, 1, f"{mine}: expected .*thesis.txt")
    assert_refused(command("index", "build", "--embeddings", world.embeddings, "--out", mine), 1, f"{mine}")
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("what", ["train", "encode", "index", "evaluate"])
def test_places_that_cannot_be_written(world: Any, tmp_path: Path, what: str) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    out = file / "out"
    arguments: dict[str, tuple[object, ...]] = {
        "train": ("train", world.config, "--out", out),
        "encode": ("encode", "--model", world.model, "--data", world.beir, "--out", out),
        "index": ("index", "build", "--embeddings", world.embeddings, "--out", out),
        "evaluate": ("evaluate", "beir", "--model", world.model, "--data", world.beir, "--out", out),
    }
    assert_refused(command(*arguments[what]), 1, f"{file}.*: (Not a directory|File exists)")


def test_full_disk_while_encoding(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "e"
    encode = ("encode", "--model", world.model, "--data", world.beir, "--out", out, "--shard-rows", 8)
    with disk_of(1100):
        assert_refused(command(*encode), 1, rf"{out}/\S+: File too large")
    assert_refused(command("index", "build", "--embeddings", out, "--out", tmp_path / "i"), 1, "incomplete")
    assert command(*encode).code == 0
    assert command("index", "verify", out).code == 0


def test_full_disk_while_indexing(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "i"
    build = ("index", "build", "--embeddings", world.embeddings, "--out", out)
    with disk_of(1600):  # vectors alone take 2560 bytes
        assert_refused(command(*build), 1, str(out))
    assert not out.exists() and not list(tmp_path.iterdir())
    assert command(*build).code == 0


def test_process_prints_one_line_and_its_exit_code(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "retriever", *arguments], env=env, capture_output=True, text=True, timeout=120
        )

    bad = run("train", "--batch-sise", "4")
    assert (bad.returncode, bad.stdout) == (2, "") and len(bad.stderr.splitlines()) == 1
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": str(tmp_path / "gone")}}))
    failed = run("train", str(path))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"retriever: {tmp_path / 'gone'}: no such model folder\n"


def test_reader_that_leaves_early_is_no_error(world: Any) -> None:
    arguments = [sys.executable, "-m", "retriever", "search", "--model", str(world.model), "--index", str(world.index)]
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*arguments, "a", "b"], env=env, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.stderr == ""


def test_a_file_in_a_message_keeps_its_name(world: World) -> None:
    done = command("mine", "--model", world.model, "--data", world.beir, "--out", "my_hard_ones.json")
    assert_refused(done, 2, "--out: expected a .jsonl file, found my_hard_ones.json")
