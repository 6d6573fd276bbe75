from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from index.files import InputError
from index.passages import Passage, PassageFile, checked_id, heading, one_line, parse_passage, read_passages
from index.records import Record


def test_content_is_title_and_text_stripped() -> None:
    assert Passage("a", "Title", "text ").content == "Title text"
    assert Passage("a", "", "text").content == "text"
    assert Passage("a", "Title", "").content == "Title"


@pytest.mark.parametrize("value", ["a", "ü-é", "😀", "a:b/c", "\u200b", "٣", 7, 0])
def test_ids_of_any_visible_text_are_kept(value: object) -> None:
    assert checked_id(value, "f:1") == str(value)


@pytest.mark.parametrize(
    "value",
    ["", " ", "a b", "a\tb", "a\n", "a\u00a0b", "a\u2028b", "a\x85b", "a\x00", "\x1b", "\x7f", "\ud83d"],
)
def test_ids_that_a_line_or_a_run_file_cannot_hold_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="f:1: expected an id without white space"):
        checked_id(value, "f:1")


@pytest.mark.parametrize("value", [None, 1.5, True, ["a"], {}])
def test_ids_of_other_types_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="f:1: expected an id of text or a whole number, found"):
        checked_id(value, "f:1")


@pytest.mark.parametrize(
    ("fields", "passage"),
    [
        ({"_id": "a", "title": "T", "text": "x", "other": 1}, Passage("a", "T", "x")),
        ({"id": 3, "text": "x"}, Passage("3", "", "x")),
        ({"_id": "a", "id": "b", "text": "x", "title": None}, Passage("a", "", "x")),
        ({"_id": "a", "text": None}, Passage("a", "", "")),
    ],
)
def test_parse_passage(fields: dict, passage: Passage) -> None:
    assert parse_passage(Record("f:1", fields)) == passage


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "f:1: expected a column '_id' or 'id', found none"),
        ({"text": "x"}, "f:1: expected a column '_id' or 'id', found text"),
        ({"_id": "a", "title": "x"}, "f:1: expected a column 'text', found _id, title"),
        ({"_id": "a", "text": 3}, "f:1: expected text in column 'text', found int"),
        ({"_id": "a", "text": "x", "title": ["y"]}, "f:1: expected text in column 'title', found list"),
    ],
)
def test_a_missing_or_wrong_column_is_named(fields: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_passage(Record("f:1", fields))
    assert str(caught.value) == message


def test_a_file_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "a", "text": "x"}\n{"_id": "b c", "text": "y"}\n')
    passages = read_passages(path)
    assert next(passages) == Passage("a", "", "x")
    with pytest.raises(InputError, match=r"corpus\.jsonl:2: expected an id without white space, found 'b c'"):
        next(passages)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_lazy_passages_are_parsed_when_called(tmp_path: Path, suffix: str) -> None:
    rows = [{"_id": f"d{n}", "text": f"text {n}"} for n in range(9)]
    path = tmp_path / f"corpus.{suffix}"
    if suffix == "csv":
        path.write_text("_id,text\n" + "".join(f"{row['_id']},{row['text']}\n" for row in rows))
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with gzip.open(path, "wt") if suffix.endswith("gz") else open(path, "w") as stream:
            stream.write("\n\n".join(map(json.dumps, rows)))
    passages = PassageFile(path)
    assert list(passages) == list(passages) == list(read_passages(path))
    lazy = list(passages.lazy())
    assert len(lazy) == 9 and lazy[7]() == Passage("d7", "", "text 7")


def test_malformed_lines_are_reported_when_parsed(tmp_path: Path) -> None:
    (path := tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": ""}\n{"_id"\n{"_id": "c", "text": ""}\n')
    first, second, third = PassageFile(path).lazy()
    assert [first().id, third().id] == ["a", "c"]
    with pytest.raises(InputError, match=f"^{path}:2: expected JSON, found"):
        second()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": ""}\n')
    passages = PassageFile(path)
    assert len(list(passages)) == len(list(passages)) == 1
    with open(path, "a") as stream:
        stream.write('{"_id": "b", "text": ""}\n')
    with pytest.raises(InputError, match=f"^{path}: changed while it was read$"):
        list(passages)
    with pytest.raises(InputError, match="no such file"):
        list(PassageFile(tmp_path / "none.jsonl"))


def test_a_title_equal_to_the_text_is_not_shown() -> None:
    assert one_line("Paris", "is a city\nin France") == "Paris is a city in France"
    assert heading("Paris", " Paris\n") == "" and one_line("Paris", " Paris\n") == "Paris"
    assert heading("Paris", "Paris is a city") == "Paris"
    assert one_line("", "x") == "x" and one_line("x", "") == "x"
