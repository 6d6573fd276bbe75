"""Studies: the plan, the cells, the table, and a study that was killed and continues."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import command, write_beir

import retriever
from retriever.config.model import ModelConfig
from retriever.config.run import TrainConfig
from retriever.errors import ConfigError
from retriever.selection.cells import all_cells
from retriever.selection.study_report import mean_interval
from retriever.training.step import TrainStep


@pytest.fixture
def config(tiny: ModelConfig, tmp_path: Path) -> dict[str, Any]:
    data = str(write_beir(tmp_path / "words"))
    return {
        "model": tiny,
        "data": {"sources": [{"path": data}], "workers": 0},
        "dev": {"path": data, "every": 9, "max_queries": 5, "at_start": False},
        "optim": {"lr": 1e-3, "projection_lr": 4e-3},
        "batch_size": 4,
        "epochs": 1,
        "log_every": 1,
        "checkpoint_every": 1,
        "plot": False,
        "precision": "fp32",
    }


def test_learning_rates_follow_the_stated_rule() -> None:
    base = retriever.train.__globals__["with_overrides"](TrainConfig(), {"lr": 1e-3, "projection_lr": 1e-2})
    for rule, factor in (("sqrt", 2.0), ("linear", 4.0), ("none", 1.0)):
        cells = all_cells(base, [base.batch_size, 4 * base.batch_size], [1e-4], [0, 1], rule)
        assert [(cell.batch_size, cell.seed) for cell in cells[:3]] == [(256, 0), (1024, 0), (256, 1)]
        made = cells[1].config(base, Path("x"), Path("c"))
        assert (made.optim.lr, made.optim.projection_lr) == pytest.approx((1e-4 * factor, 1e-2 * factor))
        assert cells[0].config(base, Path("x"), Path("c")).optim.lr == 1e-4


def test_a_cell_that_is_not_allowed_is_a_config_error() -> None:
    (cell,) = all_cells(TrainConfig(), [16], [1e-4], [10**30], "sqrt")
    with pytest.raises(ConfigError, match="seed: expected a number below"):
        cell.config(TrainConfig(), Path("x"), Path("c"))


def test_the_interval_is_students() -> None:
    # t(0.975, 2 degrees of freedom) = 4.3027; the standard deviation of 1, 2, 3 is 1.
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert mean_interval([1.0]) is None


def test_a_killed_study_continues_to_the_same_table(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, begun = TrainStep.__call__, list[str]()

    def killed(train_step: TrainStep, batch: Any, number: int, **options: Any) -> Any:
        begun.append(Path(train_step.config.out).name)
        # In the second step of the second cell, after a checkpoint.
        if len(set(begun)) == 2 and number == 1:
            raise KeyboardInterrupt
        return step(train_step, batch, number, **options)

    arguments: dict[str, Any] = {"batch_size": [4, 8], "seeds": [0, 1]}
    whole = retriever.study(config, tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            retriever.study(config, tmp_path / "study", **arguments)

    def counted(train_step: TrainStep, batch: Any, number: int, **options: Any) -> Any:
        begun.append(Path(train_step.config.out).name)
        return step(train_step, batch, number, **options)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    begun.clear()
    continued = retriever.study(config, tmp_path / "study", **arguments)
    # The finished cell is not repeated, and the interrupted one continues with its second step.
    assert "batch4_lr0.001_seed0" not in begun and begun.count("batch8_lr0.001_seed0") == 1
    assert [(r.batch_size, r.steps, r.seeds, r.score, r.interval) for r in continued.rows] == [
        (r.batch_size, r.steps, r.seeds, r.score, r.interval) for r in whole.rows
    ]
    rows = list(csv.DictReader((tmp_path / "study" / "study.csv").open()))
    assert [row["batch_size"] for row in rows] == ["4", "8"] and float(rows[1]["scaled_lr"]) == pytest.approx(
        2**0.5 / 1e3
    )
    assert len(list(csv.DictReader((tmp_path / "study" / "cells.csv").open()))) == 4
    assert "| 4 | 0.001 | 5 | 2 |" in (tmp_path / "study" / "study.md").read_text()
    assert (tmp_path / "study" / "study.png").stat().st_size > 1000
    begun.clear()
    replaced = next((tmp_path / "study" / "cells").glob("*/model")).with_name(".model.0123abcd.old")
    replaced.mkdir()
    assert retriever.study(config, tmp_path / "study", **arguments).rows == continued.rows and not begun
    assert not replaced.exists(), "what a failed removal left is removed"
    with pytest.raises(retriever.InputError, match=r"holds a study with another epochs: expected 2\.0, found 1\.0"):
        retriever.study({**config, "epochs": 2}, tmp_path / "study", **arguments)
    # A run whose loss is not finite is a result, too.
    broken = retriever.study(
        {**config, "optim": {"lr": 1e30, "max_grad_norm": None}}, tmp_path / "broken", batch_size=[4]
    )
    assert broken.rows[0].score is None and "no longer finite" in broken.rows[0].errors[0]


def test_a_dry_run_counts_steps_and_estimates_time(config: dict[str, Any], tmp_path: Path) -> None:
    from retriever.config.yaml_file import config_from_mapping, save_config

    save_config(config_from_mapping(config), tmp_path / "run.yaml")
    words = ("study", tmp_path / "run.yaml", "--out", tmp_path / "study", "--batch-size", 4, 8, "--dry-run")
    outcome = command(*map(str, words))
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert (
        "5 steps  about" in lines[0] and "2 steps  about" in lines[1] and lines[2].startswith("2 cells, 0 of them done")
    )
    assert not (tmp_path / "study" / "cells").exists()
    shutil.rmtree(tmp_path / "study")
    too_large = command(*map(str, (*words[:-3], 64)))
    assert too_large.code != 0 and "64" in too_large.err
    without = yaml.safe_load((tmp_path / "run.yaml").read_text())
    without["dev"]["path"] = ""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(without))
    assert "dev.path: expected a dev set" in command(*map(str, words)).err
