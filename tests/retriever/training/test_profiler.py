"""A profile of training names the phases of a step, adds up to it, leaves a trace, and changes nothing."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import command
from run_helpers import assert_same, results

from retriever.models import memory as graph_memory
from retriever.training.profiler import STEPS, TRACE

PHASES = ("wait for a batch", "forward without graph", "second forward", "loss", "backward", "optimizer", "between")


def test_profile_shows_where_a_step_goes_and_changes_nothing(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With memory to spare no micro-batch would run twice.
    monkeypatch.setattr(graph_memory, "available_bytes", lambda: 0)
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    settings = ("--micro-batch-tokens", "512", "--steps", "8")
    assert command("train", world.config, "--out", plain, *settings).code == 0
    outcome = command("train", world.config, "--out", profiled, *settings, "--profile")
    assert outcome.code == 0, outcome.err
    assert_same(results(plain), results(profiled))

    spent = {name: float(ms) for name, ms in re.findall(r"^(\w[\w ,]*?) +(\d+\.\d\d) +\d+\.\d%$", outcome.err, re.M)}
    assert set(PHASES) < set(spent), outcome.err
    assert all(spent[name] > 0 for name in PHASES[:-1])
    total = sum(ms for name, ms in spent.items() if name not in ("step",) and "::" not in name)
    assert abs(total - spent["step"]) < 0.1 * len(spent)
    assert re.search(r"^aten::\S+ +\d+\.\d\d +\d+\.\d% +\d+$", outcome.err, re.M)

    with gzip.open(profiled / TRACE, "rt", encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    assert sum(event.get("name") == "optimizer" for event in events) == STEPS


def test_profile_of_too_short_a_run_is_refused(world: Any, tmp_path: Path) -> None:
    outcome = command("train", world.config, "--out", tmp_path / "run", "--steps", "3", "--profile")
    assert outcome.code == 1 and "at least 6 more steps, found 3" in outcome.err
