"""All formats give the same examples, and invalid input is a one-line error with its location."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from index.files import InputError
from retriever.config.sources import SourceConfig
from retriever.data.sources import Example, Notices, read_examples
from retriever.data.table import open_source

ROWS: list[dict[str, Any]] = [
    {"query": "große Frage", "positive": "an answer", "negatives": ["wrong", "also\nwrong"]},
    {"query": "second", "positive": 'two, "quoted"', "negatives": ["wrong", "third"]},
]
EXAMPLES = [Example(row["query"], (row["positive"],), tuple(row["negatives"])) for row in ROWS]


def examples(path: Path | str, **settings: Any) -> list[Example]:
    return list(read_examples(SourceConfig(str(path), **settings), Notices()))


def json_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def beir_folder(folder: Path, *, passages: dict[str, str], qrels: dict[tuple[str, str], int]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    json_lines(folder / "corpus.jsonl", [{"_id": i, "title": "T", "text": text} for i, text in passages.items()])
    json_lines(
        folder / "queries.jsonl", [{"_id": q, "text": f"text of {q}"} for q in dict.fromkeys(q for q, _ in qrels)]
    )
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{p}\t{grade}" for (q, p), grade in qrels.items())]
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_json_lines_give_their_rows(tmp_path: Path) -> None:
    assert examples(json_lines(tmp_path / "a.jsonl", ROWS)) == EXAMPLES


def test_compressed_json_lines_give_their_rows(tmp_path: Path) -> None:
    plain = json_lines(tmp_path / "a.jsonl", ROWS).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    assert examples(tmp_path / "b.jsonl.gz") == EXAMPLES


def test_parquet_gives_its_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert examples(tmp_path / "a.parquet", format="parquet") == EXAMPLES


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_a_column_pattern_matches_numbered_columns(tmp_path: Path, suffix: str, delimiter: str) -> None:
    with open(tmp_path / f"a.{suffix}", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["anchor", "positive", "negative_1", "negative_2", "other"])
        writer.writerows([r["query"], r["positive"], *r["negatives"], "x"] for r in ROWS)
        writer.writerow(["one negative", "p", "", "n", "x"])
    found = examples(tmp_path / f"a.{suffix}", query="anchor", negatives="negative_*")
    assert found == [*EXAMPLES, Example("one negative", ("p",), ("n",))]


def test_a_cell_may_be_a_text_or_a_list(tmp_path: Path) -> None:
    rows = [{"q": "a", "p": ["x", "y", "x"], "n": "z"}, {"q": "b", "p": "x", "n": None}, {"q": "c", "p": "x"}]
    found = examples(json_lines(tmp_path / "a.jsonl", rows), query="q", positive="p", negatives="n")
    assert found == [Example("a", ("x", "y"), ("z",)), Example("b", ("x",), ()), Example("c", ("x",), ())]


def test_a_beir_folder_gives_one_example_per_query(tmp_path: Path) -> None:
    qrels = {("q1", "d2"): 1, ("q2", "d1"): 2, ("q1", "d1"): 1, ("q2", "d2"): 0, ("q3", "d1"): 0}
    folder = beir_folder(tmp_path / "b", passages={"d1": "one", "d2": "two", "d3": "three"}, qrels=qrels)
    assert examples(folder) == [
        Example("text of q1", ("T two", "T one"), ()),
        Example("text of q2", ("T one",), ()),
    ]


def test_a_beir_positive_missing_in_the_corpus_is_named(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "b", passages={"d1": "one"}, qrels={("q1", "d1"): 1, ("q2", "d9"): 1})
    with pytest.raises(InputError, match=r"qrels/train\.tsv: query 'q2': expected its passage 'd9' in the corpus"):
        examples(folder)


def test_a_beir_corpus_with_a_repeated_id_is_refused(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "b", passages={"d1": "one"}, qrels={("q1", "d1"): 1})
    json_lines(folder / "corpus.jsonl", [{"_id": "d1", "text": "a"}, {"_id": "d1", "text": "b"}])
    with pytest.raises(InputError, match="each passage id once in the corpus, found d1 again"):
        examples(folder)


@pytest.mark.parametrize("settings", [{}, {"format": "huggingface"}])
def test_a_saved_hugging_face_dataset_gives_its_rows(tmp_path: Path, settings: dict[str, Any]) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list([{**row, "other": 1} for row in ROWS])
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "many"))
    assert examples(tmp_path / "one", **settings) == EXAMPLES
    assert examples(tmp_path / "many", **settings) == EXAMPLES
    with pytest.raises(InputError, match="expected a split 'dev', found train"):
        examples(tmp_path / "many", split="dev")


def test_a_folder_of_files_is_read_by_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    json_lines(tmp_path / "set" / "train.jsonl", ROWS)
    assert examples(tmp_path / "set") == EXAMPLES
    with pytest.raises(InputError, match="cannot be read as a Hugging Face dataset"):
        examples(tmp_path / "set", split="dev")
    with pytest.raises(InputError, match="set: row 1: expected a column 'anchor', found query, positive, negatives"):
        examples(tmp_path / "set", query="anchor")


def test_a_folder_with_a_broken_file_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in (("torn", '{"query": "a", "positive": "b"}\n{"query'), ("other", '{"a": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(text)
    (tmp_path / "other" / "more.jsonl").write_text('{"b": [2]}')
    for name in ("torn", "other"):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: [^\n]*$"):
            examples(tmp_path / name)


def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "dense-retriever\[hub\]"'):
        examples("someone/something", format="huggingface")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "positive": "b"}, "expected a column 'query', found text, positive"),
        ({"query": "a", "answer": "b"}, "expected a column 'positive', found query, answer"),
        ({"query": 7, "positive": "b"}, "expected text in column 'query', found int 7"),
        ({"query": ["a"], "positive": "b"}, "expected text in column 'query', found list"),
        ({"query": "a", "positive": {"x": 1}}, "expected text or a list of texts in column 'positive', found dict"),
        ({"query": "a", "positive": "b", "negatives": [1]}, "in column 'negatives', found int 1"),
        ([1], "expected a JSON object, found list"),
    ],
)
def test_an_invalid_row_is_reported_with_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = json_lines(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(InputError) as caught:
        examples(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("absent.jsonl", {}, "no such file or folder"),
        ("a.jsonl", {"format": "csv"}, "expected a file ending in .csv"),
        ("a.txt", {}, "expected a file ending in .jsonl"),
        ("a.jsonl", {"negatives": "hard_*"}, "expected a column 'hard_\\*' for negatives, found none in any row"),
    ],
)
def test_an_invalid_source_is_one_line(tmp_path: Path, name: str, settings: dict[str, Any], message: str) -> None:
    json_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=message):
        examples(tmp_path / name, **settings)


def test_unusable_texts_are_skipped_or_corrected_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    json_lines(
        path,
        [
            {"query": " ", "positive": "p"},
            {"query": "q", "positive": ["", None]},
            {"query": None, "positive": "p"},
            {"query": "q", "positive": "nul \0", "negatives": ["", "\n"]},
            {"query": "q", "positive": ["p", "r"], "negatives": ["r", "n"]},
            {"query": "huge", "positive": "x" * (2**20 + 1)},
        ],
    )
    notices = Notices()
    found = list(read_examples(SourceConfig(str(path)), notices))
    assert found[0] == Example("q", ("nul \ufffd",), ())
    assert found[1] == Example("q", ("p", "r"), ("n",))
    assert len(found[2].positives[0]) == 2**20 + 1
    assert len(found) == 3
    assert notices.lines() == [
        f"rows skipped for an empty query: 2 (first at {path}:1)",
        f"rows skipped for an empty positive: 1 (first at {path}:2)",
        f"texts with NUL characters, replaced by U+FFFD: 1 (first at {path}:4)",
        f"rows with a negative dropped because it is one of their positives: 1 (first at {path}:5)",
        f"texts of more than 1 MiB, of which a model reads only the beginning: 1 (first at {path}:6)",
    ]


def test_an_invalid_setting_is_named() -> None:
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight: expected a positive number"):
            SourceConfig("a.jsonl", weight=weight)
    with pytest.raises(ValueError, match="path: expected"):
        SourceConfig("")


@pytest.mark.parametrize(
    ("path", "called"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name:part", ("owner/name", "part", None)),
        ("owner/name:part@v2", ("owner/name", "part", "v2")),
        ("owner/name@v2", ("owner/name", None, "v2")),
    ],
)
def test_a_hub_name_may_carry_a_subset_and_a_revision(
    path: str, called: tuple[str, str | None, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name: str, subset: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        calls.append((name, subset, revision, split, streaming))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert examples(path, format="huggingface", split="dev") == EXAMPLES
    assert calls == [(*called, "dev", True)]


def test_scores_follow_their_texts_and_prompts_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "scored.jsonl"
    rows = [
        # Empty texts, copies and negatives that are positives lose their scores, too.
        {"query": "a", "positive": ["p", "", "p"], "negatives": ["n", "p", "m"], "scores": [1, 2, 0.5, 3, -1.5]},
        {"query": "b", "positive": "p", "negatives": [], "scores": None, "kind": "find: "},
    ]
    path.write_text("".join(json.dumps({"kind": None, **row}) + "\n" for row in rows))
    config = SourceConfig(str(path), query_prompt_column="kind")
    table = open_source(config, tmp_path / "cache")
    assert [table[0], table[1]] == [
        Example("a", ("p",), ("n", "m"), (1.0, 0.5, -1.5)),
        Example("b", ("p",), (), None, "find: ", None),
    ]
    assert (table.rows_with_scores, table.prompts()) == (1, (["find: "], []))
    assert open_source(SourceConfig(str(path), scores=""), tmp_path / "cache")[0].scores is None

    csv = tmp_path / "columns.csv"
    csv.write_text("query,positive,n_1,n_2,pos,s_1,s_2\na,p,n,m,1,2,3\nb,p,n,,1,2,\n")
    config = SourceConfig(str(csv), negatives="n_*", scores="pos,s_*")
    assert [example.scores for example in read_examples(config, Notices())] == [(1.0, 2.0, 3.0), (1.0, 2.0)]

    for scores, message in (([1], "expected 2 scores"), ([1, "x"], "found 'x'"), ([1, True], "found True")):
        path.write_text(json.dumps({"query": "a", "positive": "p", "negatives": "n", "scores": scores}) + "\n")
        with pytest.raises(InputError, match=rf"scored\.jsonl:1: .*{message}"):
            list(read_examples(SourceConfig(str(path)), Notices()))
    with pytest.raises(InputError, match="column 'teacher' for scores"):
        list(read_examples(SourceConfig(str(path), scores="teacher"), Notices()))
    with pytest.raises(InputError, match="column 'kind'"):
        list(read_examples(SourceConfig(str(path), scores="", passage_prompt_column="kind"), Notices()))
