from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index.files import InputError
from index.records import count_records, read_lines, read_records


def rows(path: Path) -> list[dict]:
    return [record.fields for record in read_records(path)]


def written(path: Path, data: str | bytes) -> Path:
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_as_pandas(path: Path, names: list[str], cells: Sequence[Sequence[str]], separator: str) -> None:
    """Write what `DataFrame.to_csv(path, sep=separator, index=False)` writes; pandas uses the csv module."""
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows([names, *cells])
    written(path, text.getvalue())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_are_read_with_line_numbers(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, '{"a": 1}\n\n  \n{"a": "\u2028x\\n"}')
    assert [(r.place, r.fields) for r in read_records(path)] == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:4", {"a": "\u2028x\n"}),
    ]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"a": ', "expected JSON, found"),
        ("[1]", "expected a JSON object, found list"),
        ('"text"', "expected a JSON object, found str"),
        ("[" * 50_000, "expected JSON, found"),
        ('{"a": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_broken_line_of_json_is_named(tmp_path: Path, line: str, found: str) -> None:
    path = written(tmp_path / "a.jsonl", f'{{"a": 1}}\n\n{line}\n{{"a": 2}}\n')
    with pytest.raises(InputError) as caught:
        rows(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude00"}\n')) == [{"a": "😀"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv.gz"])
def test_invalid_utf8_is_reported_with_its_line(tmp_path: Path, name: str) -> None:
    line = b'{"a": 1}\n' if "jsonl" in name else b"a\n"
    path = written(tmp_path / name, line * 3 + b"\xe9\n" + line * 3)
    with pytest.raises(InputError) as caught:
        rows(path)
    assert str(caught.value) == f"{path}:4: expected UTF-8, found byte 0xe9"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_a_byte_order_mark_is_skipped(tmp_path: Path, name: str) -> None:
    text = '{"a": "1"}\n' if name == "a.jsonl" else "a\n1\n"
    assert rows(written(tmp_path / name, b"\xef\xbb\xbf" + text.encode())) == [{"a": "1"}]


def test_quoted_cells_hold_delimiters_quotes_and_line_ends(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'q,p\r\n"one, ""two""\nthree",x\r\ny,z\r\n')
    records = list(read_records(path))
    assert [record.fields for record in records] == [{"q": 'one, "two"\nthree', "p": "x"}, {"q": "y", "p": "z"}]
    assert records[1].place == f"{path}:4"


def test_a_cell_may_hold_a_long_document(tmp_path: Path) -> None:
    assert len(rows(written(tmp_path / "a.tsv", f"q\tp\n{'x' * 300_000}\ty\n"))[0]["q"]) == 300_000


@pytest.mark.parametrize(("row", "found"), [("1", 1), ("1,2,3", 3), ("1,2,3,4", 4)])
def test_rows_with_a_wrong_number_of_cells_are_refused(tmp_path: Path, row: str, found: int) -> None:
    path = written(tmp_path / "a.csv", f"q,p\n1,2\n{row}\n")
    with pytest.raises(InputError) as caught:
        rows(path)
    assert str(caught.value) == f"{path}:3: expected 2 columns, found {found}"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "q,p,q\n1,2,3\n")
    with pytest.raises(InputError, match=r"a\.csv:1: .*'q' twice"):
        rows(path)


def test_an_unclosed_quote_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'q,p\n"1,2\n3,4\n')
    with pytest.raises(InputError, match=r"a\.csv:2: expected a row of cells, found: "):
        rows(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_a_damaged_gzip_file_is_refused_in_one_line(tmp_path: Path, name: str, damage: str) -> None:
    line = '{{"a": "{0}"}}\n' if "jsonl" in name else '"{0}"\n'
    path = written(tmp_path / name, "".join(line.format(n * 7919) for n in range(20_000)))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    else:
        data = bytearray(b"plain text\n")
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}[: ]") as caught:
        rows(path)
    assert "\n" not in str(caught.value)


def test_parquet_rows_come_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["x", None]}), path)
    assert [(r.place, r.fields) for r in read_records(path)] == [
        (f"{path}: row 1", {"id": 1, "text": "x"}),
        (f"{path}: row 2", {"id": 2, "text": None}),
    ]


def test_damaged_parquet_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(n) for n in range(20_000)]}), path)
    data = bytearray(path.read_bytes())
    data[200:5000] = bytes(4800)
    for damaged in (bytes(data), bytes(data[:1000]), b"no parquet", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet: cannot be read as Parquet: ") as caught:
            rows(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz", "a.parquet"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: no such file"):
        rows(tmp_path / name)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=name):
            rows(tmp_path / name)


def test_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.xlsx: expected a file ending in \.jsonl"):
        rows(tmp_path / "a.xlsx")


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "a.jsonl", "")) == []
    assert rows(written(tmp_path / "a.csv", "")) == []
    assert rows(written(tmp_path / "b.csv", "q,p\n")) == []


def test_a_quote_that_spans_rows_of_a_tsv_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", '_id\ttext\n1\tone\n2\t"Quoted start\n3\tx\n4\tends with"\n5\ty\n')
    with pytest.raises(InputError, match=r"a\.tsv:3: expected a quote that closes in its row, .* closes in line 5"):
        rows(path)
    assert rows(written(path, '_id\ttext\n1\t"two\nlines"\n'))[0]["text"] == "two\nlines"
    # With a quoted header it is accepted.
    assert [row["_id"] for row in rows(written(path, '"_id"\ttext\n2\t"Quoted\n3\tx\n4\tend"\n5\ty\n'))] == ["2", "5"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "tsv.gz"])
@given(
    cells=st.lists(
        st.tuples(*[st.text(alphabet='ab\t\n",\u00e9', max_size=12)] * 3).filter(
            # Cells that look like whole rows are tested above; an empty row is skipped.
            lambda row: any(row) and "\t".join(row).count("\n") < 2
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tables_written_by_pandas_are_read(kind: str, cells: list[tuple[str, ...]], tmp_path: Path) -> None:
    names = ["q", "p", "n"]
    separator = "," if kind.startswith("csv") else "\t"
    path = tmp_path / f"a.{kind}"
    write_as_pandas(path, names, cells, separator)
    assert rows(path) == [dict(zip(names, row, strict=True)) for row in cells]


def test_a_quoted_cell_may_hold_tabs_and_several_line_ends(tmp_path: Path) -> None:
    text = "one\ttwo\nthree\tfour\tfive\nsix"
    for row in ([text, "x"], ["x", text], ["", f'{text}"quoted"']):
        path = tmp_path / "a.tsv"
        write_as_pandas(path, ["q", "p"], [row], "\t")
        assert list(rows(path)[0].values()) == row


def test_read_lines_reads_gzip_and_reports_invalid_utf8(tmp_path: Path) -> None:
    assert list(read_lines(written(tmp_path / "a.txt.gz", "a\n\nb"))) == ["a", "", "b"]
    with pytest.raises(InputError, match=r"a\.txt:2: expected UTF-8, found byte 0xff"):
        list(read_lines(written(tmp_path / "a.txt", b"a\n\xff\n")))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_rows_of_a_damaged_file_are_not_counted(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        whole = gzip.compress("".join(f'{{"_id": "{number}"}}\n' for number in range(3000)).encode())
    else:
        pyarrow.parquet.write_table(pyarrow.table({"_id": list(range(3000))}), path)
        whole = path.read_bytes()
    path.write_bytes(whole)
    assert count_records(path) == 3000
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    for data in (whole[:middle], b"neither", *([damaged] if name.endswith(".gz") else [])):
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"{name}: cannot be read"):
            count_records(path)


def test_a_quote_that_closes_inside_a_cell_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('query\tpositive\nwhat\t"the" 5 inch disk\n')
    with pytest.raises(InputError, match=r'a\.tsv:2: expected a row of cells.*write "" for each quote of its text'):
        list(read_records(path))
