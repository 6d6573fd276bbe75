"""Script `train_on_ranks.py CONFIG`: train with 1, 2, 3 and 4 processes, and resume a run of 4 with 2.

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


def main(config: str) -> None:
    """Compare all runs."""
    out = Path("runs")
    on_ranks(2, waits_longer_than_a_collective)
    on_ranks(1, trained(config, out / "1"))
    expected = results(out / "1")
    assert len({json.dumps(row.get("loss")) for row in expected["rows"]}) > 5
    for size in (2, 3, 4):
        on_ranks(size, trained(config, out / str(size)))
        assert_near(results(out / str(size)), expected)
        print(size, flush=True)
    changed = out / "4"
    for folder in sorted((changed / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    on_ranks(2, resumed(changed))
    assert_near(results(changed), expected)
    print("changed", flush=True)
    clip = ("--loss.name", "clip", "--data.negatives", "0", "--steps", "4", "--dev.path", "")
    for size in (1, 3):
        on_ranks(size, trained(config, out / f"clip{size}", *clip))
    assert_near(results(out / "clip3"), results(out / "clip1"))
    print("clip", flush=True)
    sigmoid = ("--loss.name", "sigmoid", "--loss.logit-scale", "10", "--steps", "4", "--dev.path", "")
    for size in (1, 3):
        on_ranks(size, trained(config, out / f"sigmoid{size}", *sigmoid))
    assert_near(results(out / "sigmoid3"), results(out / "sigmoid1"))
    print("sigmoid", flush=True)
    switches = ("--data.positives", "all", "--data.negatives-seen-by", "own", "--loss.limit.margin", "0.02")
    for size in (1, 3):
        on_ranks(size, trained(config, out / f"switches{size}", *switches, "--steps", "4", "--dev.path", ""))
    assert_near(results(out / "switches3"), results(out / "switches1"))
    print("switches", flush=True)
    blocks = ("--data.mix", "blocks", "--steps", "3", "--dev.path", "")
    for size in (1, 3):
        on_ranks(size, trained(config, out / f"blocks{size}", *blocks))
    assert_near(results(out / "blocks3"), results(out / "blocks1"))
    print("blocks", flush=True)
    compare_stored(config, out)
    print("stored", flush=True)


def compare_stored(config: str, out: Path) -> None:
    """Compare runs with a teacher, random passages and frozen passages on 1 and 3 processes."""
    tree = yaml.safe_load(Path(config).read_text())
    lines = [
        json.loads(line) for source in tree["data"]["sources"] for line in Path(source["path"]).read_text().splitlines()
    ]
    texts = dict.fromkeys(text for row in lines for text in row["positive"])
    corpus, model, store = out / "corpus.jsonl", out / "1" / "model", out / "store"
    corpus.write_text("".join(json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    short = ("--steps", "2", "--dev.path", "")
    teacher = ("--loss.teacher.kind", "pool_kl", "--loss.teacher.regression", "0.5", "--loss.teacher.model", str(model))
    drawn = ("--data.random-passages", "7", "--data.corpus", str(corpus))
    encode = ["encode", "--model", str(model), "--data", str(corpus), "--out", str(store), "--device", "cpu"]

    def encoded() -> None:
        # Its summary is no word of this script's output.
        with contextlib.redirect_stdout(sys.stderr):
            assert command_line(encode) == 0

    on_ranks(1, encoded)
    tree["model"] = {"name": str(model), "dropout": 0.0, "shared": False}
    tree["data"]["negatives"], tree["loss"]["symmetric"], tree["query_only"] = 0, False, str(store)
    frozen = out / "frozen.yaml"
    frozen.write_text(yaml.safe_dump(tree))
    for size in (1, 3):
        on_ranks(size, trained(config, out / f"teacher{size}", *teacher, *drawn, *short))
        on_ranks(size, trained(str(frozen), out / f"frozen{size}", *short))
    for name in ("teacher", "frozen"):
        assert_near(results(out / f"{name}3"), results(out / f"{name}1"))


if __name__ == "__main__":
    main(sys.argv[1])
