"""Queries and passages that are numbered alike: every command scores the pairs that the qrels judge."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import MEANINGS, command, write_config, write_lines

from eval.runs import read_trec_run, write_trec_run
from retriever.cli.terminal import Terminal
from retriever.config.run import DevConfig
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.errors import ConfigError
from retriever.models.towers import load_towers
from retriever.training.image_validation import ImageDevSet
from retriever.training.validation import TextDevSet

WORDS = list(MEANINGS)


def write_numbered(folder: Path, judged: dict[int, int]) -> Path:
    """A set whose query i asks for passage i word by word, so that every model and BM25 rank it first."""
    rows: list[object] = [{"_id": number, "text": MEANINGS[word]} for number, word in enumerate(WORDS)]
    write_lines(folder / "corpus.jsonl", rows)
    write_lines(folder / "queries.jsonl", rows)
    (folder / "qrels").mkdir()
    lines = "".join(f"{query}\t{passage}\t1\n" for query, passage in judged.items())
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every query's own number is judged, but that of query 0: there passage 1 is."""
    folder = tmp_path_factory.mktemp("numbered") / "set"
    return write_numbered(folder, {number: number or 1 for number in range(len(WORDS))})


def system(report: dict[str, Any], name: str) -> tuple[float, int]:
    """MRR@1 of a system, and how many passages were left out of its run."""
    found = report["sets"]["set"]
    return found["systems"][name]["mean"]["mrr@1"], found["identical_ids_left_out"][name]


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_file_and_bm25(numbered: Path, tmp_path: Path, keep: bool) -> None:
    run = {str(query): {str(query): 2.0, "1": 1.5 if query == 0 else 1.0} for query in range(2, len(WORDS))}
    write_trec_run(tmp_path / "run.trec", run | {"0": {"0": 2.0, "1": 1.0}, "1": {"1": 1.0}}, "t")
    words = [
        "evaluate",
        "run",
        f"ours={tmp_path / 'run.trec'}",
        "--bm25",
        "--data",
        numbered,
        "--out",
        tmp_path / "out",
    ]
    words += ["--keep-identical-ids"] if keep else []
    first = command(*words, "--json")
    assert first.code == 0, first.err
    assert system(json.loads(first.out), "ours") == ((19 / 20, 0) if keep else (1.0, 1))
    bm25 = system(json.loads(first.out), "BM25")
    assert bm25 == (19 / 20, 0 if keep else 1)
    # BM25's run that was kept says as much.
    again = command(*words)
    assert system(json.loads((tmp_path / "out" / "report.json").read_text()), "BM25") == bm25
    said = "ours: passages left out because they have the id of their query and are not judged for it: 1 ("
    assert (said in again.out, said in (tmp_path / "out" / "report.html").read_text()) == (not keep, not keep)


def test_bm25_that_was_kept_with_identical_ids_is_not_used_without(numbered: Path, tmp_path: Path) -> None:
    words = ["evaluate", "run", "--bm25", "--data", numbered, "--out", tmp_path / "out", "--json"]
    counts = [system(json.loads(command(*words, *more).out), "BM25")[1] for more in ([], ["--keep-identical-ids"], [])]
    assert counts == [1, 0, 1]


@pytest.mark.parametrize("keep", [False, True])
def test_a_model_by_exact_search_and_by_an_index(numbered: Path, world: Any, tmp_path: Path, keep: bool) -> None:
    more = ["--keep-identical-ids"] if keep else []
    words = ["evaluate", "beir", "--model", world.model, "--data", numbered, "--out", tmp_path, "--factory", "Flat"]
    done = command(*words, "--k", 5, *more)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "evaluation.json").read_text())["sets"]["set"]
    assert found["mean"]["mrr@1"] >= 19 / 20 and found["index"]["mean"] == found["mean"]
    assert found["identical_ids_left_out"] == (0 if keep else 1)
    for name in ("run.trec", "index.trec"):
        run = read_trec_run(tmp_path / "set" / name)
        assert all(str(n) in run[str(n)] for n in range(1, 20)) and ("0" in run["0"]) == keep
        assert {len(scores) for scores in run.values()} == {5}
    warned = "queries with the id of a passage that is not judged for them"
    assert (warned in done.err, "set: passages left out because" in done.err) == (not keep, not keep)


@pytest.mark.parametrize("keep", [False, True])
def test_the_dev_set_of_a_training_run(numbered: Path, world: Any, keep: bool, capsys: pytest.CaptureFixture) -> None:
    dev = TextDevSet.open(DevConfig(path=str(numbered), split="test", keep_identical_ids=keep))
    towers = load_towers(str(world.model))
    towers.eval()
    with tempfile.TemporaryDirectory() as folder:
        found = dev.measures(towers, Path(folder), EncodeOptions(), Terminal(), tick=None, ranks=Ranks())
    assert found["mrr@1"] >= 19 / 20
    assert ("dev.keep_identical_ids keeps them" in capsys.readouterr().err) == (not keep)
    assert dev.fingerprint != dataclasses.replace(dev, keep_identical_ids=not keep).fingerprint


def test_a_run_is_trained_with_a_dev_set_numbered_alike(numbered: Path, world: Any, tiny: Any, tmp_path: Path) -> None:
    dev = {"path": str(numbered), "split": "test", "every": 5}
    assert command("train", write_config(tmp_path / "run.yaml", tiny, world.pairs, dev=dev, epochs=1)).code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(row["dev_ndcg@10"] for row in rows if "dev_ndcg@10" in row) > 0.9


def test_a_set_of_images_has_no_such_switch() -> None:
    with pytest.raises(ConfigError, match=r"dev\.keep_identical_ids: expected false"):
        ImageDevSet.open(DevConfig(path="anywhere", keep_identical_ids=True))
