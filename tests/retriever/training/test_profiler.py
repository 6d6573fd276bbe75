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


def test_a_profile_reports_phases_and_does_not_change_the_run(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With free memory no micro-batch would be recomputed.
    monkeypatch.setattr(graph_memory, "available_bytes", lambda: 0)
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    settings = ("--micro-batch-tokens", "512", "--steps", "8")
    assert command("train", world.config, "--out", plain, *settings).code == 0
    outcome = command("train", world.config, "--out", profiled, *settings, "--profile")
    assert outcome.code == 0, outcome.err
    assert_same(results(plain), results(profiled))

    times = {name: float(ms) for name, ms in re.findall(r"^(\w[\w ,]*?) +(\d+\.\d\d) +\d+\.\d%$", outcome.err, re.M)}
    assert set(PHASES) < set(times), outcome.err
    assert all(times[name] > 0 for name in PHASES[:-1])
    total = sum(ms for name, ms in times.items() if name not in ("step",) and "::" not in name)
    assert abs(total - times["step"]) < 0.1 * len(times)
    assert re.search(r"^aten::\S+ +\d+\.\d\d +\d+\.\d% +\d+$", outcome.err, re.M)

    with gzip.open(profiled / TRACE, "rt", encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    assert sum(event.get("name") == "optimizer" for event in events) == STEPS


def test_a_profile_of_a_short_run_is_refused(world: Any, tmp_path: Path) -> None:
    outcome = command("train", world.config, "--out", tmp_path / "run", "--steps", "3", "--profile")
    assert outcome.code == 1 and "at least 6 more steps, found 3" in outcome.err
