"""Runs as `train_on_ranks.py CONFIG`: one run by 1, 2, 3 and 4 processes, and a run of 4 that 2 go on with.

Every process is a fork of this one, which has loaded the libraries; it runs the command line as torchrun would.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from run_helpers import results
from suite_on_ranks import on_ranks

import retriever.trainer  # noqa: F401 - before the forks, which then share the libraries
from retriever.cli import main as command_line


def trained(config: str, out: Path) -> Any:
    def run() -> None:
        torch.set_num_threads(1)
        assert command_line(["train", config, "--out", str(out)]) == 0

    return run


def resumed(out: Path) -> Any:
    def run() -> None:
        torch.set_num_threads(1)
        assert command_line(["train", "--resume", str(out)]) == 0

    return run


def assert_near(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal but for the order in which float32 sums are added."""
    assert one["checkpoints"] == other["checkpoints"]
    assert one["model"].keys() == other["model"].keys()
    for mine, theirs in zip(one["rows"], other["rows"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert abs(value - theirs[key]) <= 2e-5 * max(1, abs(value)), (mine["step"], key, value, theirs[key])
    for name, tensors in one["tensors"].items():
        for key, tensor in tensors.items():
            error = float((tensor - other["tensors"][name][key]).abs().max())
            assert error <= 2e-5 * max(1, float(tensor.abs().max())), (name, key, error)


def main(config: str) -> None:
    """Compare all of them."""
    out = Path("runs")
    on_ranks(1, trained(config, out / "1"))
    wanted = results(out / "1")
    assert len({json.dumps(row.get("loss")) for row in wanted["rows"]}) > 5
    for size in (2, 3, 4):
        on_ranks(size, trained(config, out / str(size)))
        assert_near(results(out / str(size)), wanted)
        print(size, flush=True)
    changed = out / "4"
    for folder in sorted((changed / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    on_ranks(2, resumed(changed))
    assert_near(results(changed), wanted)
    print("changed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
