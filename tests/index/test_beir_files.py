"""BEIR folders: with or without header, plain or compressed, and one-line errors with file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from beir.datasets.data_loader import GenericDataLoader

from eval.runs import read_trec_run
from index.beir import BeirDataset, is_beir_folder, read_qrels, read_queries
from index.files import InputError

HEADER = "query-id\tcorpus-id\tscore\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def lines(*rows: dict[str, str]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def folder_of(tmp_path: Path, qrels: str = HEADER + "q1\td1\t1\nq2\td2\t2\n", gz: str = "") -> Path:
    folder = tmp_path / "toy"
    write(folder / f"corpus.jsonl{gz}", lines(*({"_id": f"d{i}", "title": "t", "text": f"x{i}"} for i in (1, 2))))
    write(folder / f"queries.jsonl{gz}", lines(*({"_id": f"q{i}", "text": f"ask {i}"} for i in (1, 2, 3))))
    write(folder / "qrels" / f"test.tsv{gz}", qrels)
    return folder


@pytest.mark.parametrize("header", ["", HEADER, "query_id\tcorpus_id\tscore\n", "Query-ID\tCorpus-ID\tScore\r\n"])
def test_first_line_is_data_unless_it_is_a_header(tmp_path: Path, header: str) -> None:
    path = write(tmp_path / "test.tsv", header + "q1\td1\t1\nq1\td2\t0\n")
    assert read_qrels(path) == {"q1": {"d1": 1, "d2": 0}}


def test_trec_qrels_have_four_columns(tmp_path: Path) -> None:
    assert read_qrels(write(tmp_path / "q.qrels", "q1 0 d1 1\nq1 0 d2 -1\n")) == {"q1": {"d1": 1, "d2": -1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "q1\td1\n", "test.tsv:2: expected 3 .* found 2"),
        (HEADER + "q1\td1\t1\nq1\t0\td2\t1\n", "test.tsv:3: expected 3 columns, found 4"),
        (HEADER + "q1\td1\t1\n\nq1\td2\tyes\n", "test.tsv:4: expected a whole number as grade, found 'yes'"),
        (HEADER + "q1\td1\t0.5\n", "test.tsv:2: expected a whole number as grade, found '0.5'"),
        (HEADER + HEADER, "test.tsv:2: expected a whole number"),
        ("q1\td1\t1\nq1\td1\t2\n", "test.tsv:2: expected one grade for query q1, passage d1, found 1 and 2"),
    ],
)
def test_bad_qrels_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_qrels(write(tmp_path / "test.tsv", text))
    assert "\n" not in str(caught.value)


TABLE = [["q1", "d1", "1"], ["q2", "d2", "2"], ["q3", "d1", "0"]]


def as_text(rows: list[list[str]], separator: str = "\t") -> str:
    return "".join(separator.join(row) + "\n" for row in rows)


@pytest.mark.parametrize("separator", ["\t", " "])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("header", [None, ["query-id", "corpus-id", "score"], ["", "query-id", "corpus-id", "score"]])
def test_qrels_with_row_numbers_are_refused(
    tmp_path: Path, header: list[str] | None, start: int, separator: str
) -> None:
    numbered = [[str(number), *row] for number, row in enumerate(TABLE, start=start)]
    path = write(tmp_path / "test.tsv", as_text([header or [], *numbered], separator))
    found = (
        r":2: expected 3 columns, found 4 \(the header has 3\)"
        if header
        else ":[12]: expected query, 0, passage, grade"
    )
    with pytest.raises(InputError, match=rf"test\.tsv{found}"):
        read_qrels(path)


def test_numeric_query_ids_are_not_taken_for_row_numbers(tmp_path: Path) -> None:
    text = "0 0 d1 1\n1 0 d2 2\n2 0 d1 0\n"
    assert read_qrels(write(tmp_path / "q.qrels", text)) == {"0": {"d1": 1}, "1": {"d2": 2}, "2": {"d1": 0}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("query-id\tcorpus-id\tsplit\tscore", "test.tsv:1: expected the passage's id .* found 'split'"),
        ("query-id\tscore", "test.tsv:1: expected 3 .* or 4 .* columns, found 2"),
        ("query-id\ta\tb\tcorpus-id\tscore", "test.tsv:1: expected 3 .* or 4 .* columns, found 5"),
        ("qid\titer\tdocid\trel", "test.tsv:2: expected 4 columns, found 3 .the header has 4"),
    ],
)
def test_a_header_of_other_columns_is_refused(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_qrels(write(tmp_path / "test.tsv", f"{header}\n" + as_text(TABLE)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("corpus-id\tquery-id\tscore", "expected the query's id in the first column, found 'corpus-id'"),
        ("query-id\tscore\tcorpus-id", "expected a header .* found 'query-id score corpus-id'"),
        ("score\tquery-id\tcorpus-id", "expected a header .* found 'score query-id corpus-id'"),
        ("id\tquery-id\tcorpus-id\tscore", "expected a header .* found 'id query-id corpus-id score'"),
        ('"query-id"\t"corpus-id"\t"score"', 'expected a header .* found \'"query-id" '),
        ("doc\td1\ttrue", "expected a whole number as grade, found 'true'"),
    ],
)
def test_a_first_line_that_is_neither_a_header_nor_a_judgement_is_named(
    tmp_path: Path, header: str, message: str
) -> None:
    with pytest.raises(InputError, match=rf"test\.tsv:1: {message}"):
        read_qrels(write(tmp_path / "test.tsv", f"{header}\n" + as_text(TABLE)))


def test_a_query_may_be_called_as_a_column_is(tmp_path: Path) -> None:
    assert read_qrels(write(tmp_path / "test.tsv", "doc\td1\t1\n")) == {"doc": {"d1": 1}}


@pytest.mark.parametrize("grade", ["1", "+1", "1.0", "1.", "1.000", "1e0", "1.0e+00", "10e-1"])
def test_integer_grades_in_any_notation(tmp_path: Path, grade: str) -> None:
    assert read_qrels(write(tmp_path / "test.tsv", f"q1\td1\t{grade}\n")) == {"q1": {"d1": 1}}


@pytest.mark.parametrize(
    "grade", ["0.5", "1.5e0", "true", "True", "null", "None", "nan", "inf", "1_0", "1,0", "0x1", "१"]
)
def test_non_integer_grades_are_refused(tmp_path: Path, grade: str) -> None:
    path = write(tmp_path / "test.tsv", HEADER + f"q1\td1\t1\nq1\td2\t{grade}\n")
    with pytest.raises(InputError, match=rf"test\.tsv:3: expected a whole number as grade, found '{grade}'"):
        read_qrels(path)


@pytest.mark.parametrize("grade", ["99999999999999999999", "-1e300", "2147483648"])
def test_too_large_grades_are_refused(tmp_path: Path, grade: str) -> None:
    with pytest.raises(InputError, match=r"test\.tsv:1: expected a grade between -2147483648 and 2147483648"):
        read_qrels(write(tmp_path / "test.tsv", f"q1\td1\t{grade}\n"))


@pytest.mark.parametrize(
    ("grades", "expected"),
    [
        ([1.0, 0.0], {"d1": 1, "d2": 0}),
        ([Decimal("1.00"), Decimal("2.00")], {"d1": 1, "d2": 2}),
        (["1.0", "3"], {"d1": 1, "d2": 3}),
        ([1.0, 0.5], "found '0.5'"),
        ([1, None], "found 'null'"),
        ([1.0, float("nan")], "found 'nan'"),
        ([True, True], "found 'true'"),
        ([False, False], "found 'false'"),
        (["1", None], "found 'null'"),
    ],
)
def test_grades_of_parquet_files(tmp_path: Path, grades: list[object], expected: object) -> None:
    path = tmp_path / "qrels" / "test.parquet"
    write_table(path, {"query-id": ["q", "q"], "corpus-id": ["d1", "d2"], "score": grades})
    if isinstance(expected, dict):
        assert read_qrels(path) == {"q": expected}
    else:
        with pytest.raises(InputError, match=rf"test\.parquet: row \d: expected a whole number as grade, {expected}"):
            read_qrels(path)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, {"d1": 1, "d2": 1}),
        ({"__index_level_0__": [0, 1]}, {"d1": 1, "d2": 1}),
        ({"Score": [0, 2]}, {"d1": 0, "d2": 2}),
        ({"relevance": [0, 2], "iteration": [0, 0]}, {"d1": 0, "d2": 2}),
        ({"score": [0, 2], "label": [1, 1]}, {"d1": 0, "d2": 2}),
        ({"label": [0, 2], "grade": [1, 1]}, "found label, grade"),
        ({"judgement": [0, 2]}, "found judgement"),
    ],
)
def test_grades_of_a_parquet_file_are_never_guessed(
    tmp_path: Path, columns: dict[str, list[object]], expected: object
) -> None:
    path = tmp_path / "qrels" / "test.parquet"
    write_table(path, {"query-id": ["q", "q"], "corpus-id": ["d1", "d2"], **columns})
    if isinstance(expected, dict):
        assert read_qrels(path) == {"q": expected}
    else:
        with pytest.raises(InputError, match=rf"row 1: expected one column of grades, called 'score', {expected}"):
            read_qrels(path)


def test_lines_beginning_with_hash_are_comments(tmp_path: Path) -> None:
    text = f"# made by hand\n\n#\n{HEADER}q1\td1\t1\n#q1\td2\t1\n  # indented\nq1\t#d3\t2\n"
    path = write(tmp_path / "test.tsv", text)
    assert read_qrels(path) == {"q1": {"d1": 1, "#d3": 2}}
    with pytest.raises(InputError, match=r"test\.tsv:9: expected 3 columns, found 2"):
        read_qrels(write(path, text + "q1\td4\n"))


def test_query_ids_beginning_with_hash_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with (folder / "queries.jsonl").open("a") as stream:
        stream.write('{"_id": "#4", "text": "ask 4"}\n')
    with pytest.raises(
        InputError, match=r"queries\.jsonl:4: expected a query's id without # at its beginning, found '#4'"
    ):
        BeirDataset.open(folder)
    write_table(tmp_path / "test.parquet", {"query-id": ["#4"], "corpus-id": ["d1"]})
    with pytest.raises(InputError, match=r"test\.parquet: row 1: expected a query's id without #"):
        read_qrels(tmp_path / "test.parquet")


def test_repeated_judgements_count_once(tmp_path: Path) -> None:
    assert read_qrels(write(tmp_path / "test.tsv", "q1\td1\t1\nq1\td1\t1\n")) == {"q1": {"d1": 1}}


def test_truncated_gzip_and_invalid_utf8_are_reported(tmp_path: Path) -> None:
    whole = gzip.compress((HEADER + "q1\td1\t1\n" * 2000).encode())
    (tmp_path / "test.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"test\.tsv\.gz: cannot be read after line \d+: "):
        read_qrels(tmp_path / "test.tsv.gz")
    (tmp_path / "latin.tsv").write_bytes("q1\td\t1\nq1\té\t1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.tsv:2: expected UTF-8, found byte 0xe9"):
        read_qrels(tmp_path / "latin.tsv")


@pytest.mark.parametrize("read", [read_qrels, read_trec_run])
def test_a_damaged_gzip_file_is_refused_wherever_its_damage_lies(tmp_path: Path, read: Callable) -> None:
    line = "q{0} 0 d{0} 1\n" if read is read_qrels else "q{0} Q0 d{0} 1 {0} t\n"
    whole = gzip.compress("".join(line.format(number) for number in range(3000)).encode())
    path, rng = tmp_path / "file.gz", np.random.default_rng(0)
    for place in [3, 10, 12, *rng.integers(18, len(whole), 30).tolist()]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"file\.gz(: cannot be read after line \d+|:\d+: expected)"):
            read(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"_id": "q1", "text": "a"}, {"_id": "q1", "text": "b"}], "queries.jsonl:2: expected each query id once"),
        ([{"_id": "q1", "text": " "}], "queries.jsonl:1: expected text for query q1"),
        ([{"_id": "q1"}], "queries.jsonl:1: expected a column 'text', found _id"),
        ([{"text": "a"}], "queries.jsonl:1: expected a column '_id' or 'id', found text"),
        ([{"_id": "q 1", "text": "a"}], "queries.jsonl:1: expected an id without white space"),
    ],
)
def test_bad_queries_name_the_line(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_queries(write(tmp_path / "queries.jsonl", lines(*rows)))


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_a_split_contains_only_its_judged_queries(tmp_path: Path, gz: str) -> None:
    data = BeirDataset.open(folder_of(tmp_path, gz=gz))
    assert (data.name, data.split) == ("toy", "test")
    assert data.queries == {"q1": "ask 1", "q2": "ask 2"}
    assert data.qrels == {"q1": {"d1": 1}, "q2": {"d2": 2}}
    assert [passage.content for passage in data.passages()] == ["t x1", "t x2"]
    data.check(passage.id for passage in data.passages())


def test_reads_the_same_data_as_the_beir_package(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    corpus, queries, qrels = GenericDataLoader(str(folder)).load("test")
    data = BeirDataset.open(folder)
    assert (data.queries, data.qrels) == (queries, qrels)
    assert {p.id: {"title": p.title, "text": p.text} for p in data.passages()} == corpus


def write_table(path: Path, columns: dict[str, list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_parquet_folders_of_the_hub_are_read(tmp_path: Path) -> None:
    name = "train-00000-of-00001.parquet"
    write_table(tmp_path / "corpus" / name, {"_id": ["d1", "d2"], "text": ["x1", "x2"]})
    write_table(tmp_path / "queries" / name, {"_id": ["q1", "q2"], "text": ["ask 1", "ask 2"]})
    write_table(tmp_path / "qrels" / name, {"query-id": ["q2", "q1", "q2"], "corpus-id": ["d1", "d2", "d2"]})
    data = BeirDataset.open(tmp_path)
    assert is_beir_folder(tmp_path) and data.qrels == {"q2": {"d1": 1, "d2": 1}, "q1": {"d2": 1}}
    assert data.queries == {"q2": "ask 2", "q1": "ask 1"} and [p.content for p in data.passages()] == ["x1", "x2"]
    for split, grades in (("test", [2, 0]), ("dev", [1, 1])):
        columns = {"query-id": ["q1", "q1"], "corpus-id": ["d1", "d2"], "score": grades}
        write_table(tmp_path / "qrels" / f"{split}-00000-of-00001.parquet", columns)
    assert BeirDataset.open(tmp_path).qrels == {"q1": {"d1": 2, "d2": 0}}
    write_table(tmp_path / "corpus" / "train-00001-of-00002.parquet", {"_id": ["d3"], "text": ["x3"]})
    with pytest.raises(InputError, match=r"corpus: expected one Parquet file, found 2"):
        list(BeirDataset.open(tmp_path).passages())


def test_ids_and_texts_may_be_of_any_script(tmp_path: Path) -> None:
    folder = tmp_path / "سوال"
    write(
        folder / "corpus.jsonl",
        lines({"_id": "文書一", "title": "犬", "text": "飼い主に忠実"}, {"_id": "ق-٢", "text": "كلب"}),
    )
    write(folder / "queries.jsonl", lines({"_id": "प्रश्न१", "text": "कुत्ता"}))
    write(folder / "qrels" / "test.tsv", HEADER + "प्रश्न१\t文書一\t2\nप्रश्न१\tق-٢\t1\n")
    data = BeirDataset.open(folder)
    data.check(passage.id for passage in data.passages())
    assert data.qrels == {"प्रश्न१": {"文書一": 2, "ق-٢": 1}} and data.name == "سوال"


def test_dangling_ids_are_counted_and_the_first_named(tmp_path: Path) -> None:
    data = BeirDataset.open(folder_of(tmp_path, HEADER + "q1\td1\t1\nq1\td9\t1\nq2\td8\t1\nq2\td9\t1\n"))
    with pytest.raises(InputError, match=r"test\.tsv:3: expected passage ids .*d9, which is not there \(and 1 more\)"):
        data.check(["d1", "d2"])
    with pytest.raises(InputError, match=r"test\.tsv:2: expected ids of queries\.jsonl, found q7, which is not there$"):
        BeirDataset.open(folder_of(tmp_path, HEADER + "q7\td1\t1\n"))
    data.qrels["q1"]["d0"] = 1  # not from the file
    with pytest.raises(
        InputError, match=r"test\.tsv: expected passage ids of the corpus, found d0, which is not there$"
    ):
        data.check(["d1", "d8", "d9"])


def test_missing_files_and_empty_qrels_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        BeirDataset.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"expected qrels/dev\.tsv or qrels/dev\.tsv\.gz, found neither"):
        BeirDataset.open(folder_of(tmp_path), "dev")
    with pytest.raises(InputError, match=r"test\.tsv: expected judgements, found none"):
        BeirDataset.open(folder_of(tmp_path, HEADER))
