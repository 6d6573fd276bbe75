"""`retriever split` and `retriever.split`: no leakage, every pair in one split, deterministic files."""

from __future__ import annotations

import csv
import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from cli_helpers import command, write_lines, write_pairs
from hypothesis import example, given, settings
from hypothesis import strategies as st

import retriever
from index.beir import BeirDataset
from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.config.sources import SourceConfig
from retriever.data.sources import Notices, read_examples
from retriever.errors import ConfigError

SPLITS = ("train", "dev", "test")
COLUMNS = {"query": "question", "positive": "answer", "negatives": "wrong"}
FLAGS = [word for name, column in COLUMNS.items() for word in (f"--{name}", column)]

Row = dict[str, Any]
Pairs = set[tuple[str, str]]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder: Path) -> dict[str, Pairs]:
    """Return the pairs of texts of each existing split, as evaluation reads them."""
    found = {}
    for split in SPLITS:
        if (folder / "qrels" / f"{split}.tsv").exists():
            data = BeirDataset.open(folder, split)
            texts = {passage.id: passage.content for passage in data.passages()}
            data.check(texts)
            found[split] = {(data.queries[q], texts[p]) for q, grades in data.qrels.items() for p in grades}
    return found


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_of(rows: list[Row]) -> Pairs:
    return {(row["query"].strip(), positive.strip()) for row in rows for positive in row["positive"]}


def single(count: int) -> list[Row]:
    """Rows that have nothing in common."""
    return [{"query": f"q{n}", "positive": [f"p{n}"], "negatives": [f"n{n}"]} for n in range(count)]


def chained(count: int, alone: int) -> list[Row]:
    """Queries that share positives in a chain, and some that share none."""
    chain = [{"query": f"c{n}", "positive": [f"x{n}", f"x{n + 1}"]} for n in range(count)]
    return [*chain, *single(alone)]


odd = st.sampled_from(
    ["a", "b", "ä", "tab\there", "line\nend", 'quote "', "\u2028", "\x85z", "🎻", "c\\n", "\r\nd", "#e"]
)
text = st.builds("".join, st.lists(odd, min_size=1, max_size=2)).map(lambda t: f" {t}x")
row = st.fixed_dictionaries(
    {
        "query": text,
        "positive": st.lists(text, min_size=1, max_size=2),
        "negatives": st.lists(text, max_size=2),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(row, min_size=3, max_size=25), st.sampled_from([None, "query"]), st.integers(0, 3), st.randoms())
@example([{"query": q, "positive": [p], "negatives": []} for q, p in ("ab", "ba", "cd", "ef")], None, 0, None)
def test_splits_are_disjoint_complete_and_independent_of_the_order(
    rows: list[Row], by: Any, seed: int, random: Any
) -> None:
    if len({row["query"].strip() for row in rows}) < 3:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report = retriever.split(write_lines(folder / "a.jsonl", [*rows]), folder / "a", by=by, seed=seed)
        found = read(folder / "a")
        assert len(found) == 3 and all(found.values())
        # Every pair is in exactly one split, with unchanged texts.
        assert sum(map(len, found.values())) == len(pairs_of(rows))
        assert set.union(*found.values()) == pairs_of(rows)
        queries = {split: {query for query, _ in pairs} for split, pairs in found.items()}
        assert sum(map(len, queries.values())) == len(set.union(*queries.values()))
        assert report.queries == {split: len(texts) for split, texts in queries.items()}
        assert report.pairs == {split: len(pairs) for split, pairs in found.items()}
        held_out = found["dev"] | found["test"]
        shared = {query for query, positive in held_out if positive in {p for _, p in found["train"]}}
        assert report.shared_positives == len(shared)
        if report.by == "component":
            assert not {t for pair in held_out for t in pair} & {t for pair in found["train"] for t in pair}
            assert not {t for pair in found["dev"] for t in pair} & {t for pair in found["test"] for t in pair}
        # The corpus has every passage once, and the training rows are complete.
        passages = [passage.text for passage in BeirDataset.open(folder / "a").passages()]
        given = {text.strip() for row in rows for text in [*row["positive"], *row["negatives"]]}
        assert len(passages) == len(given) == report.passages and set(passages) == given
        trained = list(read_examples(SourceConfig(str(folder / "a" / "train.jsonl")), Notices()))
        assert {(e.query, p) for e in trained for p in e.positives} == found["train"]
        assert sorted((e.query, *e.positives, *e.negatives) for e in trained) == sorted(
            (row["query"].strip(), *dict.fromkeys(positives), *negatives)
            for row in rows
            for positives in [[t.strip() for t in row["positive"]]]
            for negatives in [[t for t in dict.fromkeys(n.strip() for n in row["negatives"]) if t not in positives]]
            if row["query"].strip() in queries["train"]
        )
        shuffled = rows[::-1] if random is None else random.sample(rows, len(rows))
        retriever.split(write_lines(folder / "b.jsonl", [*shuffled]), folder / "b", by=by, seed=seed)
        assert content(folder / "a") == content(folder / "b")


def test_every_format_gives_the_same_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"query": f"große\t{n}", "positive": f'two, "{n}"\nlines', "negatives": f"wrong {n % 3}"} for n in range(30)
    ]
    write_lines(tmp_path / "a.jsonl", [*rows])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "hub"))
    names = ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv", "a.tsv", "hub")
    for name in names:
        retriever.split(str(tmp_path / name), tmp_path / "out" / name, test=0.2)
    assert all(content(tmp_path / "out" / name) == content(tmp_path / "out" / "a.jsonl") for name in names)
    # The folder is a source as well; its qrels have no hard negatives.
    again = retriever.split(tmp_path / "out" / "a.csv", tmp_path / "again", passages=tmp_path / "out" / "a.csv")
    train = read(tmp_path / "out" / "a.csv")["train"]
    assert set.union(*read(tmp_path / "again").values()) == train and sum(again.pairs.values()) == len(train) == 23
    assert (tmp_path / "again" / "corpus.jsonl").read_bytes() == (
        tmp_path / "out" / "a.csv" / "corpus.jsonl"
    ).read_bytes()
    assert not any(row["negatives"] for row in lines(tmp_path / "again" / "train.jsonl"))
    assert any("with grade 1" in note and "--passages" not in note for note in again.notes)


def test_ids_depend_only_on_the_text(tmp_path: Path) -> None:
    for name, count in (("a", 20), ("b", 40)):
        retriever.split(write_lines(tmp_path / f"{name}.jsonl", [*single(count)]), tmp_path / name)
    for file in ("corpus.jsonl", "queries.jsonl"):
        few, many = ({row["text"]: row["_id"] for row in lines(tmp_path / name / file)} for name in "ab")
        assert few.items() < many.items() and all(set(row) == {"_id", "text"} for row in lines(tmp_path / "a" / file))
    assert {row["text"]: row["_id"] for row in lines(tmp_path / "a" / "queries.jsonl")}["q0"] == "q0db211d0252e771e"


def test_the_queries_depend_on_the_seed(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*single(60)])
    tests = []
    for seed in (0, 1, 0):
        retriever.split(source, tmp_path / str(len(tests)), test=10, seed=seed)
        tests.append(read(tmp_path / str(len(tests)))["test"])
    assert tests[0] == tests[2] != tests[1]


@pytest.mark.parametrize(
    ("dev", "test", "sizes"),
    [(None, None, [36, 2, 2]), (5, 0.25, [25, 5, 10]), (0, 3, [37, 0, 3]), (0.1, 0, [36, 4, 0]), (0, 0, [40, 0, 0])],
)
def test_sizes_are_numbers_or_fractions_and_size_0_writes_no_file(
    tmp_path: Path, dev: float | None, test: float | None, sizes: list[int]
) -> None:
    report = retriever.split(write_lines(tmp_path / "a.jsonl", [*single(40)]), tmp_path / "a", dev=dev, test=test)
    assert list(report.queries.values()) == list(report.rows.values()) == sizes
    found = read(tmp_path / "a")
    assert {split: len(pairs) for split, pairs in found.items()} == {
        split: size for split, size in zip(SPLITS, sizes, strict=True) if size
    }


def test_a_group_with_most_queries_is_reported_and_stays_in_train(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*chained(60, 40)])
    done = command("split", "--data", source, "--out", tmp_path / "a", "--dev", 10, "--test", 10)
    assert done.code == 0 and "has 60.0% of all queries and is entirely in train" in done.err
    assert "a  passages 141  groups 41  by component\n" in done.out
    assert "test  queries 10  pairs 10  rows 10\n" in done.out


def test_too_large_groups_are_reported_and_queries_are_split_instead(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*chained(95, 5)])
    words = ("split", "--data", source, "--dev", 10, "--test", 10)
    done = command(*words, "--out", tmp_path / "a", "--json")
    report = json.loads(done.out)
    assert (done.code, report["by"], report["largest_group"], report["groups"]) == (0, "query", 95, 6)
    assert report["queries"] == {"train": 80, "dev": 10, "test": 10} and 0 < report["shared_positives"] <= 20
    assert (
        "undivided groups give 0 dev queries (10 requested) and 5 test queries (10 requested) and leave 95 for training"
        in done.err
    )
    assert "has 95.0% of all queries; split by query text instead" in done.err
    assert f"{report['shared_positives']} queries of dev and test have a positive that is also" in done.err
    refused = command(*words, "--out", tmp_path / "b", "--by", "component")
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert "request fewer, or split with --by query" in refused.err and not (tmp_path / "b").exists()
    by_query = command(*words, "--out", tmp_path / "c", "--by", "query")
    assert by_query.code == 0 and "instead" not in by_query.err
    assert content(tmp_path / "c") == content(tmp_path / "a")


def test_skipped_rows_are_counted(tmp_path: Path) -> None:
    rows: list[Any] = [
        *single(10),
        {"query": " ", "positive": "p"},
        {"query": "q", "positive": ["", None]},
        {"query": "q0 ", "positive": ["\tp0"], "negatives": ["p0", "n0"]},
        {"query": "a\0b", "positive": ["p"]},
    ]
    passages: list[Any] = [
        {"_id": "1", "title": "T", "text": "more"},
        {"_id": "2", "text": " p1"},
        {"_id": "3", "text": " "},
        {"_id": "4", "title": "", "text": "T more "},
    ]
    done = command(
        *("split", "--data", write_lines(tmp_path / "a.jsonl", rows), "--out", tmp_path / "a", "--json"),
        *("--passages", write_lines(tmp_path / "c.jsonl", passages)),
    )
    report = json.loads(done.out)
    assert report["skipped"] == {
        "rows skipped for an empty query": 1,
        "rows skipped for an empty positive": 1,
        "rows with a negative dropped because it equals one of their positives except for white space": 1,
        "texts with NUL characters, replaced by U+FFFD": 1,
        "passages skipped for an empty text": 1,
        "repeated pairs, which qrels list once": 1,
        "further passages skipped because their text is already present": 2,
    }
    assert sum(report["rows"].values()) == 12 and sum(report["pairs"].values()) == 11
    texts = [row["text"] for row in lines(tmp_path / "a" / "corpus.jsonl")]
    assert sorted(texts) == sorted([*(f"p{n}" for n in range(10)), *(f"n{n}" for n in range(10)), "p", "T more"])
    assert (
        f"{tmp_path / 'a.jsonl'}: rows skipped for an empty query: 1 (first at {tmp_path / 'a.jsonl'}:11)" in done.err
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dev", "1.5"], 2, "--dev: expected a whole number of queries, or a share above 0 and below 1, found 1.5"),
        (["--test", "x"], 2, "--test: expected"),
        (["--by", "row"], 2, "--by"),
        (["--query", "anchor"], 1, "pairs.jsonl:1: expected a column 'anchor', found question, answer, wrong"),
        (["--split", "dev", "--data", "nothing"], 1, "nothing: no such file or folder"),
        (["--dev", "30", "--test", "30"], 1, "expected more than 30 dev and 30 test queries"),
        (["--passages", "nothing.jsonl"], 1, "nothing.jsonl: no such file"),
        (["--passages", "torn.jsonl"], 1, "torn.jsonl:2: expected JSON"),
        (["--data", "torn.jsonl"], 1, "torn.jsonl:2: expected JSON"),
        (["--data", "empty.jsonl"], 1, "empty.jsonl: expected at least one example, found none"),
        (["--data", ""], 2, "--data: expected a file or a folder, found nothing"),
        (["--out", "there"], 1, "there: expected a folder that does not exist yet, found one"),
        (["--out", "hub/out", "--data", "hub"], 2, "--out: expected a folder outside of the source hub, found hub/out"),
    ],
)
def test_invalid_requests_are_one_line_errors_without_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    row = {"question": "q", "answer": "p", "_id": "1", "text": "t"}
    write_lines(tmp_path / "torn.jsonl", [row, '{"question": '])
    write_lines(tmp_path / "empty.jsonl", [])
    write_lines(tmp_path / "hub" / "train.jsonl", [row])
    (tmp_path / "there").mkdir()
    before = sorted(os.listdir())
    done = command("split", "--data", "pairs.jsonl", "--out", "out", *FLAGS, *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err and done.err.count("\n") == 1
    assert sorted(os.listdir()) == before and not os.listdir("there") and os.listdir("hub") == ["train.jsonl"]


def test_arguments_of_the_function_are_checked(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl")
    for wrong, message in (({"dev": 1.0}, "dev: exp"), ({"test": True}, "test: exp"), ({"by": "row"}, "by: expected")):
        with pytest.raises(ConfigError, match=message):
            retriever.split(source, tmp_path / "out", **COLUMNS, **wrong)  # type: ignore[arg-type]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="link: expected a folder that does not exist yet"):
        retriever.split(source, tmp_path / "link", **COLUMNS)  # type: ignore[arg-type]


def test_a_folder_created_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import retriever.data.splitting.split as module

    def written(*arguments: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").touch()

    monkeypatch.setattr(module, "_write", written)
    with pytest.raises(InputError, match="expected a folder that does not exist yet"):
        retriever.split(write_lines(tmp_path / "a.jsonl", [*single(9)]), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["a.jsonl", "out", "other"]


def test_a_model_trains_with_the_dev_set_and_is_evaluated_on_the_test_set(tiny: ModelConfig, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    split = ("split", "--data", write_pairs(tmp_path / "pairs.jsonl"), "--out", data, *FLAGS, "--dev", 6, "--test", 6)
    assert command(*split).code == 0
    config = {
        "out": str(run),
        "model": {"architecture": tiny.architecture, "tokenizer": tiny.tokenizer, "max_length": 64},
        "data": {
            "sources": [{"path": str(data)}, {"path": str(data / "train.jsonl")}],
            "negatives": 1,
            "workers": 0,
        },
        "dev": {"path": str(data)},
        "batch_size": 16,
        "precision": "fp32",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = command("train", tmp_path / "run.yaml")
    assert done.code == 0, done.err
    assert f"{data}: 48 examples" in done.err and f"{data / 'train.jsonl'}: 48 examples" in done.err
    assert "ndcg@10" in (run / "metrics.jsonl").read_text().lower()
    evaluate = ("evaluate", "beir", "--model", run / "model", "--data", data, "--out", tmp_path / "report")
    done = command(*evaluate, "--split", "test", "--json")
    assert done.code == 0, done.err
    assert 0 < json.loads(done.out)["sets"]["data"]["mean"]["recall@100"] <= 1
    judged = BeirDataset.open(data, "test").qrels
    assert len(judged) == 6
