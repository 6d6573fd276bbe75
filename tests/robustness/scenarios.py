"""Commands that write something, and what they write: to be killed, starved and run twice at a time."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forks

Words = list[object]


@dataclass(frozen=True)
class Scenario:
    """A command in a folder of its own.

    Attributes:
        words: gets the folder; returns the words of the command. It is called again for a rerun, when the folder holds
            what the first run has left.
        inputs: artifacts that are copied into the folder.
        output: name of the file or folder that the command writes or changes.
        ranks: processes, under torchrun if there are several.
    """

    words: Callable[[Path], Words]
    inputs: tuple[str, ...]
    output: str
    ranks: int = 1


def _line(*words: object) -> Callable[[Path], Words]:
    return lambda folder: list(words)


def _train(folder: Path) -> Words:
    started = (folder / "run" / "config.yaml").exists()
    return ["train", "--resume", "run"] if started else ["train", "run.yaml"]


def _index_words(*words: object) -> Callable[[Path], Words]:
    return lambda folder: ["index", *words]


# Two undisturbed runs may take the same time by chance, so files that differ between them are not all that have times.
TIME = re.compile(rb'"evaluation_time": [0-9.e-]+')
_EVALUATE = ("evaluate", "beir", "--model", "run/model", "--data", "beir", "--out", "out", "--k", 10)
_ENCODE = ("encode", "--model", "run/model", "--data", "beir", "--out", "out", "--shard-rows", 4)
_QUERIES = ("--queries", "questions.jsonl", "--model", "run/model", "--target-recall", 0.5)
_BUILD = ("build", "--embeddings", "store", "--out", "out", "--factory", "IVF2,Flat")
_SCORE = ("score", "--data", "mined.jsonl", "--out", "out.jsonl", "--model")
_STUDY = ("study", "run.yaml", "--out", "out", "--batch-size", 16, 32, "--seeds", 1)
SCENARIOS: dict[str, Scenario] = {
    "train": Scenario(_train, ("run.yaml", "pairs.jsonl", "beir"), "run"),
    "train on two ranks": Scenario(_train, ("run.yaml", "pairs.jsonl", "beir"), "run", ranks=2),
    "encode": Scenario(_line(*_ENCODE), ("run", "beir"), "out"),
    "encode on two ranks": Scenario(_line(*_ENCODE), ("run", "beir"), "out", ranks=2),
    "encode codes": Scenario(_line(*_ENCODE, "--dtype", "int8"), ("run", "beir"), "out"),
    "encode images": Scenario(
        _line("encode", "--model", "clip", "--data", "images.jsonl", "--out", "out", "--shard-rows", 2),
        ("clip", "images", "images.jsonl"),
        "out",
    ),
    "index build": Scenario(_index_words(*_BUILD, *_QUERIES), ("store", "run", "questions.jsonl"), "out"),
    "index build on two ranks": Scenario(_index_words(*_BUILD), ("store",), "out", ranks=2),
    "index build on disk": Scenario(_index_words(*_BUILD, "--on-disk"), ("store",), "out"),
    "index export": Scenario(
        _index_words("export", "store", "--to", "parquet", "--where", "out", "--batch", 4), ("store",), "out"
    ),
    "index merge": Scenario(_index_words("merge", "part1", "part2", "--out", "out"), ("part1", "part2"), "out"),
    "index add": Scenario(
        _index_words("add", "part1", "--embeddings", "more", "--out", "out"), ("part1", "more"), "out"
    ),
    "index delete": Scenario(_index_words("delete", "index", "--ids", "d1", "d7", "--out", "out"), ("index",), "out"),
    # Without --out they replace the index. Repeated, they change nothing.
    "index add in place": Scenario(_index_words("add", "part1", "--embeddings", "more"), ("part1", "more"), "part1"),
    "index delete in place": Scenario(_index_words("delete", "index", "--ids", "d1", "d7"), ("index",), "index"),
    "index tune": Scenario(
        _index_words("tune", "index", "--embeddings", "store", *_QUERIES),
        ("index", "store", "run", "questions.jsonl"),
        "index",
    ),
    "mine": Scenario(
        _line("mine", "--model", "run/model", "--data", "beir", "--out", "out.jsonl", "--embeddings", "emb"),
        ("run", "beir"),
        "out.jsonl",
    ),
    "mine on two ranks": Scenario(
        _line("mine", "--model", "run/model", "--data", "beir", "--out", "out.jsonl"),
        ("run", "beir"),
        "out.jsonl",
        ranks=2,
    ),
    "score": Scenario(_line(*_SCORE, "cross_encoder"), ("cross_encoder", "mined.jsonl"), "out.jsonl"),
    "score on two ranks": Scenario(_line(*_SCORE, "run/model"), ("run", "mined.jsonl"), "out.jsonl", ranks=2),
    "merge": Scenario(
        _line("merge", "--models", "run/model", "plain_model", "--out", "out", "--dev", "beir", "--grid", 2),
        ("run", "plain_model", "beir"),
        "out",
    ),
    "duplicates": Scenario(
        _line("duplicates", "--embeddings", "store", "--out", "out.jsonl", "--threshold", 0.5), ("store",), "out.jsonl"
    ),
    "export": Scenario(_line("export", "--model", "run/model", "--out", "out"), ("run",), "out"),
    "study": Scenario(_line(*_STUDY), ("run.yaml", "pairs.jsonl", "beir"), "out"),
    "split": Scenario(
        _line(
            *("split", "--data", "pairs.jsonl", "--out", "out", "--query", "question", "--positive", "answer"),
            *("--negatives", "wrong", "--dev", 3, "--test", 3, "--by", "query"),
        ),
        ("pairs.jsonl",),
        "out",
    ),
    "evaluate beir": Scenario(_line(*_EVALUATE), ("run", "beir"), "out"),
    "evaluate beir on two ranks": Scenario(_line(*_EVALUATE), ("run", "beir"), "out", ranks=2),
    "evaluate zero-shot": Scenario(
        _line("evaluate", "zero-shot", "--model", "clip", "--data", "classes", "labels.jsonl", "--out", "out"),
        ("clip", "classes", "images", "labels.jsonl"),
        "out",
    ),
    "evaluate probe": Scenario(
        _line(
            *("evaluate", "probe", "--model", "clip", "--data", "labels.jsonl", "--train", "more_labels.jsonl"),
            *("--out", "out"),
        ),
        ("clip", "images", "labels.jsonl", "more_labels.jsonl"),
        "out",
    ),
    "evaluate run": Scenario(
        _line("evaluate", "run", "system.run", "--data", "beir", "--out", "out", "--permutations", 100),
        ("system.run", "beir"),
        "out",
    ),
    "evaluate compare": Scenario(
        _line(
            "evaluate", "compare", "system.run", "other.run", "--data", "beir", "--out", "out", "--permutations", 100
        ),
        ("system.run", "other.run", "beir"),
        "out",
    ),
}


def prepare(scenario: Scenario, world: Path, folder: Path) -> None:
    """Make a new folder with the inputs of a scenario, with their modification times."""
    _empty(folder)
    for name in scenario.inputs:
        source = world / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy2(source, folder / name)
    if "run.yaml" in scenario.inputs:
        text = (folder / "run.yaml").read_text().replace(f"{world}/", f"{folder}/")
        (folder / "run.yaml").write_text(text)


def _empty(folder: Path) -> None:
    # The folder itself may be a mounted file system.
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def start(scenario: Scenario, folder: Path, log: Path, limit: Callable[[], None] | None = None) -> int:
    """Start the command in a fork, in a session of its own. Its output goes to `log`. Returns its process id."""
    words = [str(word) for word in scenario.words(folder)]
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        if limit is not None:
            limit()
        module = ["-m", "retriever", *words]
        if scenario.ranks > 1:
            forks.ranks_are_forks()
            module = forks.torchrun(scenario.ranks, *module)
        forks.run_and_exit(module)
    finally:
        os._exit(99)


def snapshot(folder: Path, names: tuple[str, ...] | None = None) -> dict[str, str]:
    """Return the sha256 of every file of a folder, or of some of its entries, without the times of MTEB files."""
    roots = [folder] if names is None else [folder / name for name in names]
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*")))]
    return {
        str(file.relative_to(folder)): hashlib.sha256(TIME.sub(b"", file.read_bytes())).hexdigest()
        for file in files
        if file.is_file()
    }
