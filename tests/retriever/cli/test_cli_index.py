"""`retriever index …` from end to end: tuned, in parts, merged, added to, deleted from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import MEANINGS, command, write_beir

from index.manifest import read_manifest


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "queries.jsonl"
    texts = [text for meaning in MEANINGS.values() for text in (meaning, f"what is {meaning}")]
    lines = (json.dumps({"_id": f"q{number}", "text": text}) for number, text in enumerate(texts))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_target_is_met_with_real_queries_and_said_to_be(world: Any, tmp_path: Path, queries: Path) -> None:
    out = tmp_path / "index"
    place = ("--embeddings", world.embeddings, "--out", out, "--queries", queries, "--model", world.model)
    done = command("index", "build", *place, "--factory", "IVF4,Flat", "--target-recall", 0.9, "--k", 3, "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["target_met"] is True and summary["recall"] >= 0.9 and 1 <= summary["nprobe"] <= 4
    assert "bytes a vector" in done.err and "recall target 0.9 met by nprobe" in done.err
    assert read_manifest(out).field("tuning", dict)["queries_from"] == "queries"
    place = (out, "--embeddings", world.embeddings, "--queries", queries, "--model", world.model, "--k", 3)
    done = command("index", "tune", *place, "--target-recall", 0.999, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["recall"] == 1
    assert command("index", "verify", out).code == 0


def test_a_curve_that_is_not_drawn_is_said_not_to_be(
    world: Any, tmp_path: Path, queries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = (
        "--embeddings",
        world.embeddings,
        "--out",
        tmp_path / "index",
        "--queries",
        queries,
        "--model",
        world.model,
    )
    words = ("index", "build", *place, "--target-recall", 0.9, "--k", 3)
    assert "dense-retriever[plot]" not in command(*words).err
    assert (tmp_path / "index" / "recall.png").stat().st_size > 1000
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    done = command(*words)
    assert done.code == 0 and 'pip install "dense-retriever[plot]"' in done.err
    assert not (tmp_path / "index" / "recall.png").exists()


def test_a_target_that_cannot_be_met_fails_and_leaves_the_index(world: Any, tmp_path: Path, queries: Path) -> None:
    out = tmp_path / "index"
    place = ("--embeddings", world.embeddings, "--out", out, "--queries", queries, "--model", world.model)
    done = command("index", "build", *place, "--factory", "PQ2x4fs", "--target-recall", 1, "--k", 3, "--json")
    assert done.code == 1
    assert json.loads(done.out)["target_met"] is False
    assert "recall target 1 NOT met" in done.err
    assert command("index", "verify", out).code == 0


def test_parts_built_apart_are_merged_to_what_one_build_makes(world: Any, tmp_path: Path) -> None:
    beir = write_beir(tmp_path / "words")
    emb = tmp_path / "emb"
    encoded = command("encode", "--model", world.model, "--data", beir, "--out", emb, "--shard-rows", 7)
    assert encoded.code == 0, encoded.err
    first, second, merged, whole = (tmp_path / name for name in ("first", "second", "merged", "whole"))
    build = ("index", "build", "--embeddings", emb, "--out")
    assert command(*build, first, "--factory", "IVF2,SQ8", "--part", "1/2").code == 0
    done = command(*build, second, "--part", "2/2", "--train-from", first)
    assert done.code == 0, done.err
    done = command("index", "merge", first, second, "--out", merged, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"index": str(merged), "rows": 20}
    assert command(*build, whole, "--factory", "IVF2,SQ8").code == 0
    assert (merged / "index.faiss").read_bytes() == (whole / "index.faiss").read_bytes()
    on_disk = command("index", "merge", first, second, "--out", tmp_path / "disk", "--on-disk", "--json")
    assert on_disk.code == 0 and json.loads(on_disk.out)["rows"] == 20
    apart = ("--index", first, "--index", second)
    results = [
        command("search", "--model", world.model, *place, "--k", 5, "--json", "a large tree").out
        for place in (
            ("--index", merged),
            ("--index", whole),
            ("--index", tmp_path / "disk"),
            apart,
            (*apart, "--mmap"),
        )
    ]
    assert len(set(results)) == 1 and json.loads(results[0])["results"]


def test_deleted_passages_are_not_found_and_come_back_when_added(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "index"
    assert command("index", "build", "--embeddings", world.embeddings, "--out", out).code == 0
    search = ("search", "--model", world.model, "--index", out, "--k", 20, "--json", "large tree that bears acorns")
    ids = [result["id"] for result in json.loads(command(*search).out)["results"]]
    (tmp_path / "ids.txt").write_text(f"{ids[0]}\nunknown\n")
    done = command("index", "delete", out, "--ids-file", tmp_path / "ids.txt", "--json")
    assert json.loads(done.out) == {"index": str(out), "deleted": 1, "not_there": 1}
    assert [result["id"] for result in json.loads(command(*search).out)["results"]] == ids[1:]
    refused = command("index", "add", out, "--embeddings", world.embeddings)
    assert refused.code == 1 and "expected ids that are not yet in" in refused.err
    done = command("index", "delete", out, "--ids", *ids[1:-1], "--json")
    assert json.loads(done.out)["deleted"] == 18
    assert [result["id"] for result in json.loads(command(*search).out)["results"]] == ids[-1:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--part", "0/2"), "--part: expected a part and their number, as in 2/8, found '0/2'"),
        (("--part", "3"), "--part: expected a part"),
        (("--part", "9/2"), "--part: expected a part and their number, as in 2/8, found '9/2'"),
        (("--seed", "-1"), "--seed: expected a number from 0 to 2147483647, found -1"),
        (("--held-out", "5"), "--held-out: expected at least 30, found 5"),
        (("--target-recall", "1.2"), "--target-recall: expected more than 0 and at most 1, found 1.2"),
        (("--memory-budget-mib", "-1"), "--memory-budget-mib: expected more than 0, found -1.0"),
        (("--queries", "q.jsonl"), "--queries: expected together with --model"),
        (("--train-from", "i", "--factory", "Flat"), "--factory: leave it out with --train-from"),
    ],
)
def test_arguments_that_make_no_sense_are_answered_in_one_line(words: tuple[str, ...], message: str) -> None:
    done = command("index", "build", "--embeddings", "e", "--out", "o", *words)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tune", "i", "--embeddings", "e", "--target-recall", "1.5"), "--target-recall: expected more than 0"),
        (("tune", "i", "--embeddings", "e", "--held-out", "29"), "--held-out: expected at least 30, found 29"),
        (("merge", "i", "--out", "o"), "retriever: indexes: expected two or more to merge, found 1"),
    ],
)
def test_so_are_those_of_the_other_commands(words: tuple[str, ...], message: str) -> None:
    done = command("index", *words)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_a_gpu_is_refused_where_faiss_knows_none(world: Any, tmp_path: Path) -> None:
    import faiss

    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPU support")
    done = command("index", "build", "--embeddings", world.embeddings, "--out", tmp_path / "i", "--gpu")
    assert done.code == 2 and "pip install faiss-gpu" in done.err
    assert not (tmp_path / "i").exists()


def test_a_budget_that_nothing_fits_says_what_is_needed(world: Any, tmp_path: Path) -> None:
    place = ("--embeddings", world.embeddings, "--out", tmp_path / "i", "--memory-budget-mib", "0.00001")
    done = command("index", "build", *place)
    assert done.code == 2 and "--memory-budget-mib: expected at least" in done.err


def test_a_budget_is_meant_for_a_named_factory_too(world: Any, tmp_path: Path) -> None:
    place = ("--embeddings", world.embeddings, "--out", tmp_path / "i", "--factory", "Flat")
    done = command("index", "build", *place, "--memory-budget-mib", "0.001")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "--memory-budget-mib: expected at least 0.00245 for 20 passages of 32 dimensions (Flat)" in done.err
    done = command("index", "build", *place, "--memory-budget-mib", "0.00245")
    assert done.code == 0 and "within 0.00245 MiB" in done.err


def test_on_disk_auto_takes_a_kind_that_can_be_there_and_says_why(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "i"
    build = ("index", "build", "--embeddings", world.embeddings, "--out", out)
    done = command(*build, "--on-disk", "--memory-budget-mib", "0.0001")
    assert done.code == 0, done.err
    assert (out / "lists.ivfdata").exists()
    assert "IVF1,Flat: " in done.err and "within" not in done.err
    assert done.err.endswith("; chosen for fewer than 200,000 passages and an index on disk\n")
    done = command(*build)
    assert done.err.endswith("; chosen for fewer than 200,000 passages\n")
    done = command(*build, "--factory", "SQ8")
    assert "chosen" not in done.err
    done = command(*build, "--factory", "SQ8", "--on-disk")
    assert done.code == 1 and done.err.startswith("retriever: factory 'SQ8' on disk: expected IVF…,Flat")


def test_a_recall_is_said_to_be_of_as_many_as_there_are(world: Any, tmp_path: Path, queries: Path) -> None:
    place = ("--embeddings", world.embeddings, "--out", tmp_path / "i", "--queries", queries, "--model", world.model)
    done = command("index", "build", *place, "--target-recall", 0.9, "--k", 1000)
    assert done.code == 0 and "recall@20 1.0000" in done.err
    assert read_manifest(tmp_path / "i").field("tuning", dict)["k"] == 20
