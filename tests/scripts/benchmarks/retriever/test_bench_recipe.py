"""The benchmark of recipes changes one ingredient at a time, and measures, merges and skips rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from retriever.config.yaml_file import load_config
from scripts.benchmarks.result_rows import read_rows
from scripts.benchmarks.retriever import bench_recipe

sys.path.insert(0, str(Path(__file__).parents[3] / "retriever"))

from cli_helpers import write_beir

from retriever.config.model import ModelConfig
from retriever.models.modality import build_towers


def test_each_row_differs_in_its_ingredient_alone() -> None:
    recipe = load_config(bench_recipe.RECIPE)
    names = bench_recipe.row_names()
    configs = {name: bench_recipe.config_of(name, recipe, 3) for name in names if name != "base"}
    assert len({bench_recipe.digest(config) for config in configs.values()}) == len(configs)
    assert configs["best"].optim == recipe.optim and configs["best"].seed == 3
    assert configs["best - ema"].optim.ema is None and configs["plain + ema"].optim.ema == recipe.optim.ema
    assert configs["best - ema"].optim.schedule == "wsd" and configs["plain + ema"].optim.schedule == "linear"
    assert configs["plain"].batch_size < configs["best"].batch_size
    with pytest.raises(SystemExit, match="--rows: expected one of base, plain"):
        bench_recipe.config_of("best - nothing", recipe, 0)
    assert bench_recipe.parse_assignment("optim.lr=1.0e-4") == {"optim": {"lr": 1e-4}}


@pytest.mark.slow
def test_rows_are_trained_merged_evaluated_and_not_repeated(
    tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    build_towers(tiny).save(tmp_path / "base")
    for name in ("wordnet", "jargon", "perlfaq"):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_beir(tmp_path / "data" / name)
    words = ["bench_recipe", "--model", tmp_path / "base", "--data", tmp_path / "data", "--work", tmp_path / "work"]
    words += ["--results", tmp_path, "--rows", "base", "best + mined negatives", "--test"]
    for field in ("batch_size=8", "steps=2", "dev.every=2", "precision=fp32", "data.workers=0", "log_every=1"):
        words += ["--set", field]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    # To a random model all passages are close to the positive.
    monkeypatch.setattr(bench_recipe, "MAX_SHARE", None)
    bench_recipe.main()
    base, mined = read_rows(tmp_path / "recipes.csv")
    assert base["recipe"] == "base" and float(base["test_before"]) > 0 and base["share"] == ""
    assert mined["steps"] == "2" and float(mined["mining_seconds"]) > 0 and 0.5 <= float(mined["share"]) <= 1
    for column in ("dev", "dev_merged", "jargon_before", "perlfaq_merged", "test_before", "test_merged"):
        assert 0 < float(mined[column]) <= 1
    bench_recipe.main()
    assert len(read_rows(tmp_path / "recipes.csv")) == 2
    assert "best + mined negatives, seed 0: measured already" in capsys.readouterr().out
