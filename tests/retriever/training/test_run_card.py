"""The model card that training writes: valid metadata, true facts, and examples that run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import World, command
from huggingface_hub import ModelCard

from eval.significance import mean_interval
from retriever.config.dev import DevConfig
from retriever.config.run import TrainConfig
from retriever.models.card.card import CARD_FILE
from retriever.models.card.usage import FOLDER
from retriever.training.tracking.run_card import run_card


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that starts from a model folder with a license and has a dev set."""
    folder = tmp_path_factory.mktemp("card") / "run"
    words = ["--model.name", world.model, "--model.query-prompt", "query: ", "--optim.lr", "1e-3"]
    words += ["--dev.path", world.beir, "--dev.every", "8", "--steps", "8", "--batch-size", "16", "--out", folder]
    base = yaml_without_model(world, folder.parent / "run.yaml")
    outcome = command("train", base, *words)
    assert outcome.code == 0, outcome.err
    return folder


def yaml_without_model(world: World, path: Path) -> Path:
    import yaml

    tree = yaml.safe_load(world.config.read_text())
    path.write_text(yaml.safe_dump({key: tree[key] for key in ("data", "log_every", "precision")}))
    return path


def test_the_card_has_valid_metadata_and_the_results(run: Path, world: World) -> None:
    card = ModelCard.load(run / "model" / CARD_FILE)
    data: Any = card.data
    assert data.library_name == "sentence-transformers" and "dense-retrieval" in data.tags
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = (next(row for row in rows if row["step"] == step and "dev_ndcg@10" in row) for step in (0, 8))
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results["ndcg@10"] == round(after["dev_ndcg@10"], 4) and data.eval_results[0].dataset_split == "dev"
    for row in (before, after):
        assert row["dev_ndcg@10_low"] < row["dev_ndcg@10"] < row["dev_ndcg@10_high"]
        shown = f"{row['dev_ndcg@10']:.4f} ({row['dev_ndcg@10_low']:.4f} to {row['dev_ndcg@10_high']:.4f})"
        assert shown in card.text
    assert "| pairs.jsonl | 60 | not stated |" in card.text and "Inf-CL" in card.text
    assert "`optim.lr` | 0.001" in card.text and "| torch |" in card.text
    # Neither the metadata nor the text has the location of the run or of its data.
    assert str(run) not in card.content and str(world.pairs.parent) not in card.content
    line = (run / "model" / "retriever.sha256").read_text().splitlines()[0]
    assert line.split("  ")[0] in card.text


def test_the_examples_of_the_card_run_and_agree(run: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (run / "model" / CARD_FILE).read_text(), re.DOTALL)
    assert len(blocks) == 3
    printed = []
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block.replace(FOLDER, str(run / "model")), "card", "exec"), {})
        printed.append([float(number) for number in re.findall(r"-?\d\.\d+", out.getvalue())])
    np.testing.assert_allclose(printed[0], printed[1], atol=1e-4)
    np.testing.assert_allclose(printed[0], printed[2], atol=1e-4)


def test_the_evaluation_before_training_can_be_left_out(run: Path, world: World, tmp_path: Path) -> None:
    words = ["--model.name", world.model, "--dev.path", world.beir, "--dev.at-start", "false", "--steps", "2"]
    base = yaml_without_model(world, tmp_path / "run.yaml")
    outcome = command("train", base, *words, "--batch-size", "16", "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "not measured" in (tmp_path / "run" / "model" / CARD_FILE).read_text()


def test_a_license_is_taken_from_the_card_of_the_base_model_and_of_the_data(tmp_path: Path) -> None:
    from retriever.models.card.provenance import base_model, common_license, license_of

    snapshot = tmp_path / "models--acme--small" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Small\n")
    base = base_model(str(snapshot))
    assert (base.hub_name, base.revision, base.license) == ("acme/small", "a" * 40, (("license", "apache-2.0"),))
    # The hub refuses identifiers that it does not know.
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    other = base_model(str(snapshot))
    link = f"https://huggingface.co/acme/small/blob/{'a' * 40}/LICENSE"
    assert dict(other.license) == {"license": "other", "license_name": "own", "license_link": link}
    assert common_license([other, other]) == dict(other.license) and not common_license([other, base])
    shutil.copytree(snapshot, tmp_path / "small")
    assert dict(base_model(str(tmp_path / "small")).license) == {"license": "other", "license_name": "own"}
    (tmp_path / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\n")
    assert license_of(tmp_path / "pairs.jsonl") == "mit, cc-by-4.0"
    (tmp_path / "README.md").write_text("# A project, without a header")
    assert license_of(tmp_path / "pairs.jsonl") == ""


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    from scipy import stats

    values = np.random.default_rng(0).random(37)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(mean_interval(values), (expected.low, expected.high), rtol=1e-12)


def test_several_dev_sets_have_an_evaluation_each() -> None:
    config = TrainConfig(dev=DevConfig(paths=("data/one", "data/two:half")))
    row = {"dev_ndcg@10": 0.3, "dev_one_ndcg@10": 0.2, "dev_one_ndcg@10_low": 0.1, "dev_one_ndcg@10_high": 0.3}
    row["dev_two:half_ndcg@10"] = 0.4
    facts: dict[str, Any] = {"rows": [], "sources": [], "step": 1, "steps": 2, "processes": 1, "metric": "nDCG@10"}
    card = run_card(config, device=torch.device("cpu"), after=row, **facts)
    found = [(each.dataset, each.split, str(each.measures[0].after)) for each in card.evaluations]
    expected = [("mean of 2 sets", "dev", "0.3000"), ("one", "dev", "0.2000 (0.1000 to 0.3000)")]
    assert found == [*expected, ("two", "half", "0.4000")]
    assert not any("data/one" in str(value) for value in card.settings.values())
