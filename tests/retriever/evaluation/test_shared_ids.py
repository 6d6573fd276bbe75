"""Sets whose queries and passages share ids: every command keeps judged pairs of equal ids, and drops the others."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import MEANINGS, command, write_config, write_lines
from torch import nn

from eval.runs import read_trec_run, write_trec_run
from retriever.cli.terminal import Terminal
from retriever.config.dev import DevConfig
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.errors import ConfigError
from retriever.models.modality import load_towers
from retriever.training.validation.dev_set import TextDevSet
from retriever.training.validation.image_dev_set import ImageDevSet

WORDS = list(MEANINGS)


def write_numbered(folder: Path, judged: dict[int, int]) -> Path:
    """A set in which the text of query i is that of passage i, so that every model and BM25 rank it first."""
    rows: list[object] = [{"_id": number, "text": MEANINGS[word]} for number, word in enumerate(WORDS)]
    write_lines(folder / "corpus.jsonl", rows)
    write_lines(folder / "queries.jsonl", rows)
    (folder / "qrels").mkdir()
    lines = "".join(f"{query}\t{passage}\t1\n" for query, passage in judged.items())
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Query i is judged with passage i, except query 0, which is judged with passage 1."""
    folder = tmp_path_factory.mktemp("numbered") / "set"
    return write_numbered(folder, {number: number or 1 for number in range(len(WORDS))})


def system(report: dict[str, Any], name: str) -> tuple[float, int]:
    """MRR@1 of a system, and the number of passages left out of its run."""
    report_set = report["sets"]["set"]
    return report_set["systems"][name]["mean"]["mrr@1"], report_set["identical_ids_left_out"][name]


@pytest.mark.parametrize("keep", [False, True])
def test_run_files_and_bm25_keep_judged_identical_ids(numbered: Path, tmp_path: Path, keep: bool) -> None:
    run = {str(query): {str(query): 2.0, "1": 1.5 if query == 0 else 1.0} for query in range(2, len(WORDS))}
    write_trec_run(tmp_path / "run.trec", run | {"0": {"0": 2.0, "1": 1.0}, "1": {"1": 1.0}}, "t")
    systems = [f"ours={tmp_path / 'run.trec'}", "--bm25"]
    arguments = ["evaluate", "run", *systems, "--data", numbered, "--out", tmp_path / "out"]
    arguments += ["--keep-identical-ids"] if keep else []
    first = command(*arguments, "--json")
    assert first.code == 0, first.err
    assert system(json.loads(first.out), "ours") == ((19 / 20, 0) if keep else (1.0, 1))
    bm25 = system(json.loads(first.out), "BM25")
    assert bm25 == (19 / 20, 0 if keep else 1)
    # The cached BM25 run gives the same.
    again = command(*arguments)
    assert system(json.loads((tmp_path / "out" / "report.json").read_text()), "BM25") == bm25
    note = "ours: passages left out because they have the id of their query and are not judged for it: 1 ("
    assert (note in again.out, note in (tmp_path / "out" / "report.html").read_text()) == (not keep, not keep)


def test_a_bm25_run_cached_with_identical_ids_is_not_reused_without_them(numbered: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "run", "--bm25", "--data", numbered, "--out", tmp_path / "out", "--json"]
    flags: list[list[str]] = [[], ["--keep-identical-ids"], []]
    counts = [system(json.loads(command(*arguments, *flag).out), "BM25")[1] for flag in flags]
    assert counts == [1, 0, 1]


@pytest.mark.parametrize("keep", [False, True])
def test_exact_search_and_an_index_keep_judged_identical_ids(
    numbered: Path, world: Any, tmp_path: Path, keep: bool
) -> None:
    flags = ["--keep-identical-ids"] if keep else []
    arguments = ["--model", world.model, "--data", numbered, "--out", tmp_path, "--factory", "Flat", "--k", 5]
    done = command("evaluate", "beir", *arguments, *flags)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "evaluation.json").read_text())["sets"]["set"]
    assert result["mean"]["mrr@1"] >= 19 / 20 and result["index"]["mean"] == result["mean"]
    assert result["identical_ids_left_out"] == (0 if keep else 1)
    for name in ("run.trec", "index.trec"):
        run = read_trec_run(tmp_path / "set" / name)
        assert all(str(n) in run[str(n)] for n in range(1, 20)) and ("0" in run["0"]) == keep
        assert {len(scores) for scores in run.values()} == {5}
    warning = "queries with the id of a passage that is not judged for them"
    assert (warning in done.err, "set: passages left out because" in done.err) == (not keep, not keep)


@pytest.mark.parametrize("keep", [False, True])
def test_a_dev_set_keeps_judged_identical_ids(
    numbered: Path, world: Any, keep: bool, capsys: pytest.CaptureFixture
) -> None:
    dev = TextDevSet.open(DevConfig(path=str(numbered), split="test", keep_identical_ids=keep))
    towers = load_towers(str(world.model))
    towers.eval()
    with tempfile.TemporaryDirectory() as folder:
        measures = dev.measures(
            towers, Path(folder), EncodeOptions(), Terminal(), tick=None, ranks=Ranks(), loss=nn.Identity()
        )
    assert measures["mrr@1"] >= 19 / 20
    assert ("dev.keep_identical_ids keeps them" in capsys.readouterr().err) == (not keep)
    assert dev.fingerprint != dataclasses.replace(dev, keep_identical_ids=not keep).fingerprint


def test_a_dev_set_with_shared_ids_measures_training(numbered: Path, world: Any, tiny: Any, tmp_path: Path) -> None:
    dev = {"path": str(numbered), "split": "test", "every": 5}
    assert command("train", write_config(tmp_path / "run.yaml", tiny, world.pairs, dev=dev, epochs=1)).code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(row["dev_ndcg@10"] for row in rows if "dev_ndcg@10" in row) > 0.9


def test_image_sets_have_no_keep_identical_ids() -> None:
    with pytest.raises(ConfigError, match=r"dev\.keep_identical_ids: expected false"):
        ImageDevSet.open(DevConfig(path="anywhere", keep_identical_ids=True))
