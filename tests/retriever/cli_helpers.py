"""Run the command line in process, and write small inputs for it: pairs, a BEIR folder and a configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import yaml

from retriever.cli.command_line import main
from retriever.config.model import ModelConfig

MEANINGS = {
    "cat": "small domestic animal that purrs",
    "dog": "loyal pet that barks at strangers",
    "oak": "large tree that bears acorns",
    "pine": "evergreen tree with needles and cones",
    "river": "stream of water flowing to the sea",
    "mountain": "very high natural elevation of the earth",
    "piano": "keyboard instrument with hammers and strings",
    "violin": "small stringed instrument played with a bow",
    "bread": "baked food made of flour and water",
    "cheese": "food made from the curds of milk",
    "hammer": "tool for driving nails",
    "saw": "tool with teeth for cutting wood",
    "eagle": "large bird of prey with keen sight",
    "sparrow": "small brown bird common in towns",
    "ship": "large vessel that crosses the sea",
    "train": "engine pulling carriages along rails",
    "winter": "coldest season of the year",
    "summer": "warmest season of the year",
    "sun": "star around which the earth turns",
    "moon": "body that circles the earth each month",
}


@dataclass(frozen=True)
class World:
    """Folders written by train, encode and index build. Tests must not change them."""

    pairs: Path
    beir: Path
    config: Path
    run: Path
    model: Path
    embeddings: Path
    index: Path


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def command(*arguments: object, stdin: str = "") -> Outcome:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(stdin)), encoding="utf-8")),
    ):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def assert_refused(outcome: Outcome, code: int, *patterns: str) -> None:
    """Assert that the last line is the only error, and that it matches all patterns."""
    assert outcome.code == code, (outcome.out, outcome.err)
    lines = outcome.err.splitlines()
    assert lines and lines[-1].startswith("retriever: "), outcome.err
    assert sum(line.startswith("retriever: ") for line in lines) == 1
    assert "Traceback" not in outcome.err
    for pattern in patterns:
        assert re.search(pattern, lines[-1]), (pattern, lines[-1])


def write_lines(path: Path, rows: list[object]) -> Path:
    """Write a .jsonl file. Rows that are strings are written unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_pairs(path: Path) -> Path:
    """Write 60 rows with two hard negatives each, with other column names than the defaults."""
    meanings = list(MEANINGS.items())
    rows: list[object] = [
        {
            "question": question.format(word),
            "answer": f"{word}: {meaning}",
            "wrong": [meanings[(i + 3) % 20][1], meanings[(i + 7) % 20][1]],
        }
        for question in ("what is a {}?", "define {}", "the meaning of {}")
        for i, (word, meaning) in enumerate(meanings)
    ]
    return write_lines(path, rows)


def write_beir(folder: Path) -> Path:
    """Write a BEIR folder of 20 passages. Every query has one or two relevant passages, of grade 1 or 2."""
    words = list(MEANINGS)
    write_lines(
        folder / "corpus.jsonl", [{"_id": f"d{i}", "title": w, "text": MEANINGS[w]} for i, w in enumerate(words)]
    )
    write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"what is a {w}?"} for i, w in enumerate(words)])
    (folder / "qrels").mkdir()
    judged = [f"q{i}\td{i}\t2" for i in range(20)] + [f"q{i}\td{(i + 1) % 20}\t1" for i in range(0, 20, 3)]
    for split in ("train", "dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return folder


def write_config(path: Path, model: ModelConfig, pairs: Path, **other: object) -> Path:
    """Write a configuration file of 11 steps. `other` adds or overrides top-level keys."""
    source = {"path": str(pairs), "query": "question", "positive": "answer", "negatives": "wrong"}
    tree = {
        "out": str(path.with_suffix("")),
        "model": {name: value for name, value in dataclasses.asdict(model).items() if value is not None},
        "data": {"sources": [source], "negatives": 1, "workers": 0},
        "optim": {"lr": 1e-3},
        "batch_size": 16,
        "epochs": 3,
        "log_every": 4,
        "precision": "fp32",
        **other,
    }
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@contextmanager
def disk_of(bytes_a_file: int) -> Iterator[None]:
    """Writing fails as on a full disk (EFBIG for ENOSPC), in any library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
