"""Every option that the benchmark of the loss's options measures is a valid configuration."""

from __future__ import annotations

import pytest

from retriever.config.yaml_file import config_from_mapping
from retriever.distributed.ranks import DryRunRanks
from retriever.training.objective.checks import check_objective, given_options
from scripts.benchmarks.retriever.bench_switches import SWITCHES


@pytest.mark.parametrize("name", SWITCHES)
def test_every_option_is_a_valid_configuration(name: str) -> None:
    loss, data = SWITCHES[name]
    config = config_from_mapping({"loss": loss, "data": {"sources": [{"path": "pairs.jsonl"}], **data}})
    check_objective(config, DryRunRanks())
    assert bool(given_options(config)) == any(
        word in name for word in ("same_side", "hardness", "limit", "guide", "positives", "own")
    )
