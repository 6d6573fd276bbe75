"""Script `train_on_ranks.py CONFIG PART`: train with different numbers of processes, and compare.

Every process is a fork of this one, which has imported the libraries, and runs the command line as under torchrun.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from forks import on_ranks
from run_helpers import assert_near, results

import retriever.training.trainer  # noqa: F401 - imported before the forks, which share it
from retriever.cli.command_line import main as command_line
from retriever.distributed import context


def trained(config: str, out: Path, *more: str) -> Any:
    def run() -> None:
        torch.set_num_threads(1)
        assert command_line(["train", config, "--out", str(out), *more]) == 0

    return run


def resumed(out: Path) -> Any:
    def run() -> None:
        torch.set_num_threads(1)
        assert command_line(["train", "--resume", str(out)]) == 0

    return run


def waits_longer_than_a_collective() -> None:
    """Rank 0 works for longer than the timeout of a collective; the other one waits for it."""
    context.TIMEOUT = datetime.timedelta(seconds=1)
    with context.joined_ranks() as ranks:
        if ranks.is_first:
            time.sleep(2.5)
        assert ranks.broadcast([ranks.rank, "done"]) == [0, "done"]


def compare(config: str, out: Path, name: str, *more: str) -> None:
    """Compare runs with 1 and 3 processes."""
    for size in (1, 3):
        on_ranks(size, trained(config, out / f"{name}{size}", *more))
    assert_near(results(out / f"{name}3"), results(out / f"{name}1"))
    print(name, flush=True)


def compare_sizes(config: str, out: Path) -> None:
    """Compare runs with 1, 3 and 4 processes, and one of 4 that 2 resume."""
    on_ranks(2, waits_longer_than_a_collective)
    on_ranks(1, trained(config, out / "1"))
    expected = results(out / "1")
    assert len({json.dumps(row.get("loss")) for row in expected["rows"]}) > 5
    for size in (3, 4):
        on_ranks(size, trained(config, out / str(size)))
        assert_near(results(out / str(size)), expected)
        print(size, flush=True)
    changed = out / "4"
    for folder in sorted((changed / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    on_ranks(2, resumed(changed))
    assert_near(results(changed), expected)
    print("changed", flush=True)


def compare_losses(config: str, out: Path) -> None:
    """Compare runs with other losses."""
    short = ("--steps", "3", "--dev.path", "")
    compare(config, out, "clip", "--loss.name", "clip", "--data.negatives", "0", *short)
    compare(config, out, "sigmoid", "--loss.name", "sigmoid", "--loss.logit-scale", "10", *short)


def compare_batches(config: str, out: Path) -> None:
    """Compare runs with other batches and negatives."""
    switches = ("--data.positives", "all", "--data.negatives-seen-by", "own", "--loss.limit.margin", "0.02")
    compare(config, out, "switches", *switches, "--steps", "4", "--dev.path", "")
    compare(config, out, "blocks", "--data.mix", "blocks", "--steps", "3", "--dev.path", "")


def compare_stored(config: str, out: Path) -> None:
    """Compare runs with a teacher, random passages and frozen passages on 1 and 3 processes."""
    tree = yaml.safe_load(Path(config).read_text())
    lines = [
        json.loads(line) for source in tree["data"]["sources"] for line in Path(source["path"]).read_text().splitlines()
    ]
    texts = dict.fromkeys(text for row in lines for text in row["positive"])
    corpus, model, store = out / "corpus.jsonl", out / "1" / "model", out / "store"
    out.mkdir()
    corpus.write_text("".join(json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    short = ("--steps", "2", "--dev.path", "")
    teacher = ("--loss.teacher.kind", "pool_kl", "--loss.teacher.regression", "0.5", "--loss.teacher.model", str(model))
    drawn = ("--data.random-passages", "7", "--data.corpus", str(corpus))
    encode = ["encode", "--model", str(model), "--data", str(corpus), "--out", str(store), "--device", "cpu"]

    def encoded() -> None:
        # Its summary is no word of this script's output.
        with contextlib.redirect_stdout(sys.stderr):
            assert command_line(encode) == 0

    on_ranks(1, trained(config, out / "1", "--steps", "4", "--dev.path", ""))
    on_ranks(1, encoded)
    tree["model"] = {"name": str(model), "dropout": 0.0, "shared": False}
    tree["data"]["negatives"], tree["loss"]["symmetric"], tree["query_only"] = 0, False, str(store)
    frozen = out / "frozen.yaml"
    frozen.write_text(yaml.safe_dump(tree))
    compare(config, out, "teacher", *teacher, *drawn, *short)
    compare(str(frozen), out, "frozen", *short)


PARTS = {"sizes": compare_sizes, "losses": compare_losses, "batches": compare_batches, "stored": compare_stored}


if __name__ == "__main__":
    PARTS[sys.argv[2]](sys.argv[1], Path("runs"))
