"""Every command on damaged stores and indexes: one line that names the file, or the answer of undamaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import assert_refused, command

INDEX_FILES = ("index.faiss", "ids.txt", "passages.jsonl", "passages.offsets.npy", "manifest.json")
STORE_FILES = ("00000.npy", "00000.ids", "00000.jsonl", "manifest.json")
# How a file is damaged: nothing of this is seen by its length but the last.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "signs": lambda data: data[:-4] + bytes([data[-4] ^ 0x80]) + data[-3:],
    "bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "text": lambda data: data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :],
    "cut": lambda data: data[:-7],
}


@pytest.fixture
def damage(world: Any, tmp_path: Path) -> Callable[[Path, str, str], Path]:
    def make(folder: Path, name: str, how: str) -> Path:
        copy = tmp_path / folder.name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(DAMAGES[how](data))
        assert (copy / name).read_bytes() != data
        return copy

    return make


def test_nothing_is_made_of_a_damaged_index(world: Any, tmp_path: Path, damage: Callable) -> None:
    out = tmp_path / "out"
    for name in INDEX_FILES:
        for how in DAMAGES:
            index = damage(world.index, name, how)
            commands = [
                ("index", "verify", index),
                ("index", "merge", index, world.index, "--out", out),
                ("index", "add", index, "--embeddings", world.embeddings, "--out", out),
                ("index", "delete", index, "--ids", "d1", "--out", out),
                ("index", "tune", index, "--embeddings", world.embeddings),
            ]
            if name in ("index.faiss", "manifest.json"):
                store = ("--embeddings", world.embeddings)
                commands.append(("index", "build", *store, "--out", out, "--train-from", index))
            for words in commands:
                assert_refused(command(*words), 1, rf"{index / name}: ")
    assert not out.exists()


def test_nothing_is_made_of_a_damaged_store(world: Any, tmp_path: Path, damage: Callable) -> None:
    out = tmp_path / "out"
    for name in STORE_FILES:
        for how in DAMAGES:
            store = damage(world.embeddings, name, how)
            for words in (
                ("index", "build", "--embeddings", store, "--out", out),
                ("index", "build", "--embeddings", store, "--out", out, "--train-from", world.index),
                ("index", "tune", world.index, "--embeddings", store),
                ("index", "verify", store),
            ):
                assert_refused(command(*words), 1, rf"{store / name}: ")
    assert not out.exists()


@pytest.mark.parametrize("name", INDEX_FILES)
def test_no_measure_comes_of_a_damaged_index(world: Any, tmp_path: Path, damage: Callable, name: str) -> None:
    words = ("--model", world.model, "--data", world.beir, "--out", tmp_path / "out")
    index = damage(world.index, name, "signs")
    assert_refused(command("evaluate", "beir", *words, "--index", index), 1, rf"{index / name}: ")
    # Before the corpus is embedded.
    assert not (tmp_path / "out").exists()


def test_no_measure_or_negative_comes_of_what_an_earlier_run_left_damaged(world: Any, tmp_path: Path) -> None:
    out, mined = tmp_path / "out", tmp_path / "mined.jsonl"
    words = ("--model", world.model, "--data", world.beir)
    evaluate = ("evaluate", "beir", *words, "--out", out, "--factory", "Flat", "--json")
    mine = ("mine", *words, "--out", mined, "--embeddings", out / "words" / "embeddings")
    first = command(*evaluate)
    assert first.code == 0
    for name in INDEX_FILES:
        path = out / "words" / "index" / name
        data = path.read_bytes()
        path.write_bytes(DAMAGES["signs"](data))
        assert_refused(command(*evaluate), 1, rf"{path}: ")
        path.write_bytes(data)
    for name in STORE_FILES:
        path = out / "words" / "embeddings" / name
        data = path.read_bytes()
        path.write_bytes(DAMAGES["bit"](data))
        for run in (evaluate, mine):
            assert_refused(command(*run), 1, rf"{path}: ")
        path.write_bytes(data)
    assert not mined.exists()
    assert json.loads(command(*evaluate).out)["sets"] == json.loads(first.out)["sets"]
    assert command(*mine).code == 0 and mined.exists()


def test_no_comparison_is_made_of_a_run_that_is_not_the_one_evaluated(world: Any, tmp_path: Path) -> None:
    report, out = tmp_path / "report", tmp_path / "out"
    assert command("evaluate", "beir", "--model", world.model, "--data", world.beir, "--out", report).code == 0
    compare = ("evaluate", "run", f"ours={report}", "--data", world.beir, "--out", out)
    assert command(*compare).code == 0
    run = report / "words" / "run.trec"
    lines = run.read_text()
    run.write_text(lines.replace("q0 Q0 d0 ", "q0 Q0 d1x ", 1))
    shutil.rmtree(out)
    assert_refused(command(*compare), 1, rf"{run}: damaged: expected sha256 .* evaluation\.json")
    assert not out.exists()
    # By itself it is a run like any other.
    run.write_text(lines)
    assert command("evaluate", "run", f"ours={run}", "--data", world.beir, "--out", out).code == 0


def test_a_search_on_damage_answers_or_says_so_in_one_line(world: Any, tmp_path: Path, damage: Callable) -> None:
    query = ("--k", 20, "tree with acorns", "--json")
    whole = json.loads(command("search", "--model", world.model, "--index", world.index, *query).out)
    for name in INDEX_FILES:
        for how in DAMAGES:
            index = damage(world.index, name, how)
            for mapped in ((), ("--mmap",)):
                outcome = command("search", "--model", world.model, "--index", index, *query, *mapped)
                if outcome.code:
                    assert_refused(outcome, 1, str(index))
                elif name == "passages.jsonl":
                    # A letter of one passage: its text is not checked unless it is asked for.
                    found = json.loads(outcome.out)["results"]
                    texts = [(result["title"], result["text"]) for result in found]
                    assert (
                        sum(text != (w["title"], w["text"]) for text, w in zip(texts, whole["results"], strict=True))
                        <= 1
                    )
                else:
                    raise AssertionError((name, how, outcome.out))
            outcome = command("search", "--model", world.model, "--index", index, *query, "--verify")
            assert_refused(outcome, 1, rf"{index / name}: ")
