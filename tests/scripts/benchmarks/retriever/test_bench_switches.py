"""The benchmark of the loss's options measures valid configurations, within its time."""

from __future__ import annotations

import pytest

from retriever.config.yaml_file import config_from_mapping
from retriever.training.objective.checks import check_objective, given_options
from scripts.benchmarks.budget import Budget
from scripts.benchmarks.retriever.bench_switches import SWITCHES


@pytest.mark.parametrize("name", SWITCHES)
def test_every_option_is_a_valid_configuration(name: str) -> None:
    loss, data = SWITCHES[name]
    config = config_from_mapping({"loss": loss, "data": {"sources": [{"path": "pairs.jsonl"}], **data}})
    check_objective(config)
    assert bool(given_options(config)) == any(
        word in name for word in ("same_side", "hardness", "limit", "guide", "positives", "own")
    )


def test_no_run_begins_that_would_end_too_late(capsys: pytest.CaptureFixture[str]) -> None:
    budget = Budget(seconds=60, runs=2, pairs=70_000, device="cuda")
    assert budget.allows("the first")
    budget.count("done")
    # The time of the runs so far counts from then on.
    assert budget.allows("the second")
    assert not Budget(seconds=5, runs=2, pairs=70_000, device="cuda").allows("the first")
    printed = capsys.readouterr().out
    assert "2 runs of 70,000 pairs: about 18 s" in printed
    assert "done (1 of 2, about 0 s left)" in printed and "before the first: repeat the command" in printed
