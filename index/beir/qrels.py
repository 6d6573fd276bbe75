"""Relevance judgements: qrels of BEIR and TREC, and their Parquet form on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from index.files import InputError
from index.passages import COMMENT, checked_id, checked_query_id
from index.records import Record, read_lines, read_records

Qrels = dict[str, dict[str, int]]
"""Query id -> passage id -> grade. A grade above 0 means relevant."""

QUERY_HEADS = ("query-id", "queryid", "query", "qid", "topic")
PASSAGE_HEADS = ("corpus-id", "corpusid", "doc-id", "docid", "document-id", "passage-id", "pid", "doc", "passage")
GRADE_HEADS = ("score", "relevance", "rel", "label", "grade")
# Column positions in a line of qrels.
QUERY, PASSAGE = 0, -2
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
# Values, not names of columns: a first line that contains one is not a header.
NO_GRADES = ("nan", "inf", "infinity", "true", "false", "none", "null")
# Grades are stored as 64-bit integers; no dataset in use has larger ones.
GRADE_LIMIT = 2**31
MAX_GRADE_LENGTH = 24


def read_qrels(path: Path) -> Qrels:
    """Read qrels: BEIR's `query passage grade` or TREC's `query 0 passage grade`, separated by tabs or blanks.

    The first line is data unless its columns are the names of a header (query-id, corpus-id, score). Every line has as
    many columns as the first. Lines that begin with # are comments, as in trec_eval 10. A judgement may be repeated;
    two different grades for one pair are refused. Grades are integers, which may be written as 1.0. A Parquet file has
    columns query-id and corpus-id, and a score under any of GRADE_HEADS. Without a third column all are relevant, as in
    NanoBEIR.

    Raises:
        InputError: the file is missing or a line is malformed; the message names the line.
    """
    judgements = Judgements()
    for line, (_, columns, place) in enumerate(judgement_lines(path)):
        if line == 0 and is_header(columns):
            judgements.begin(columns, place)
        elif line == 0 and path.suffix != ".parquet" and (mistake := header_mistake(columns)):
            raise InputError(f"{place}: {mistake}")
        else:
            judgements.add(columns, place)
    judgements.check()
    return judgements.qrels


def judgement_lines(path: Path) -> Iterator[tuple[int, list[str], str]]:
    """Yield (line number, columns, "file:line") of every line of a qrels file.

    The header is included; empty lines and comments are skipped.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    if path.suffix == ".parquet":
        yield from _judgement_rows(path)
        return
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split()
        if columns and not columns[0].startswith(COMMENT):
            yield number, columns, f"{path}:{number}"


def _judgement_rows(path: Path) -> Iterator[tuple[int, list[str], str]]:
    for number, record in enumerate(read_records(path), start=1):
        for column in ("query-id", "corpus-id"):
            if column not in record.fields:
                raise InputError(f"{record.place}: expected a column '{column}', found {', '.join(record.fields)}")
        query = checked_query_id(record.fields["query-id"], record.place)
        passage = checked_id(record.fields["corpus-id"], record.place)
        grades = _grade_column(record)
        yield number, [query, passage, _grade_text(record.fields[grades] if grades else 1)], record.place


def _grade_column(record: Record) -> str | None:
    """The column of a Parquet file that holds the grades; none where it has only ids.

    Raises:
        InputError: it has other columns, and none or several of them are called a grade: to take all judgements for
            relevant would be a guess.
    """
    others = [column for column in record.fields if column not in ("query-id", "corpus-id")]
    if "score" in others:
        return "score"
    named = [column for column in others if head_names([column])[0] in GRADE_HEADS]
    others = [column for column in others if not column.startswith("__index_level_")]  # of pandas
    if len(named) == 1 or not others:
        return named[0] if named else None
    raise InputError(f"{record.place}: expected one column of grades, called 'score', found {', '.join(others)}")


def _grade_text(value: Any) -> str:
    """A grade of a Parquet file as text; null and booleans as in JSON, so that they are refused as grades."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def first_locations(path: Path, column: int, wanted: Collection[str], most: int) -> dict[str, str]:
    """Map the first `most` of the `wanted` ids in a column of a qrels file to where they first occur ("file:line").

    The file is read again: keeping the line of every id would take more memory than the qrels.
    """
    locations: dict[str, str] = {}
    for _, columns, place in judgement_lines(path):
        if len(locations) == min(most, len(wanted)):
            break
        if len(columns) > 2 and columns[column] in wanted:
            locations.setdefault(columns[column], place)
    return locations


def is_header(columns: list[str]) -> bool:
    """Whether a line is a header: its first column names a query id and its last a grade."""
    heads = head_names(columns)
    return heads[0] in QUERY_HEADS and heads[-1] in GRADE_HEADS


def header_mistake(columns: list[str]) -> str:
    """The error in a first line that is neither a header nor a judgement; empty if it may be a judgement."""
    last = columns[-1].strip("\"'").casefold()
    # A line of another width, or with a value that is not a grade, is a broken judgement.
    if len(columns) not in (3, 4) or not last[:1].isalpha() or last in NO_GRADES:
        return ""
    if head_names(columns)[0] in PASSAGE_HEADS:
        return f"expected the query's id in the first column, found {columns[0]!r:.40}"
    return f"expected a header (query-id, corpus-id, score) or a judgement, found {' '.join(columns)!r:.60}"


def head_names(columns: list[str]) -> list[str]:
    """Column names in the spelling of the lists above."""
    return [column.casefold().replace("_", "-") for column in columns]


class Judgements:
    """Collects the qrels of a file line by line. All lines have 3 or 4 columns, as many as the header or first line."""

    def __init__(self) -> None:
        self.qrels: Qrels = {}
        self._width = 0
        self._source = ""
        # To detect row numbers: whether every first column so far was the row number (from 0 or 1), and up to two
        # different values of the second column.
        self._rows = 0
        self._first = ""
        self._numbered = True
        self._second: set[str] = set()

    def begin(self, header: list[str], place: str) -> None:
        """Set the columns from a header.

        Raises:
            InputError: there are not 3 or 4 columns, or the passage id is not in the last column but one.
        """
        self._check_width(header, place)
        names = head_names(header)
        if names[PASSAGE] not in PASSAGE_HEADS and any(name in PASSAGE_HEADS for name in names):
            wanted = "the passage's id in the last column but one"
            raise InputError(f"{place}: expected {wanted}, found {header[PASSAGE]!r:.40}")
        self._width, self._source = len(header), f" (the header has {len(header)})"

    def add(self, columns: list[str], place: str) -> None:
        """Add a line.

        Raises:
            InputError: it has another number of columns, its grade is not an integer, or the pair already has another
                grade.
        """
        self._check_width(columns, place)
        query, passage, grade = columns[QUERY], columns[PASSAGE], parse_grade(columns[-1], place)
        self._width = len(columns)
        self._numbered = self._numbered and query in (str(self._rows), str(self._rows + 1))
        self._rows += 1
        self._first = self._first or place
        if len(self._second) < 2:
            self._second.add(columns[1])
        known = self.qrels.setdefault(query, {}).setdefault(passage, grade)
        if known != grade:
            found = f"{known} and {grade}"
            raise InputError(f"{place}: expected one grade for query {query}, passage {passage}, found {found}")

    def check(self) -> None:
        """Refuse a table that was written with row numbers in the first column and without a header.

        In TREC's four columns the second is the same in every line, nearly always 0.

        Raises:
            InputError: the first column numbers the rows and the second column varies.
        """
        if self._width == 4 and not self._source and self._rows > 1 and self._numbered and len(self._second) > 1:
            raise InputError(
                f"{self._first}: expected query, 0, passage, grade in four columns, found the numbers of the rows in "
                "the first; write the table without its index"
            )

    def _check_width(self, columns: list[str], place: str) -> None:
        if len(columns) not in (3, 4) or (self._width and len(columns) != self._width):
            wanted = self._width or "3 (query, passage, grade) or 4 (query, 0, passage, grade)"
            raise InputError(f"{place}: expected {wanted} columns, found {len(columns)}{self._source}")


def parse_grade(text: str, place: str) -> int:
    """Parse a grade: an integer, which may be written as 1.0 or 1e0.

    Raises:
        InputError: it is not an integer, or too large.
    """
    # Decimals of more digits than its context cannot be rounded.
    grade = Decimal(text) if len(text) <= MAX_GRADE_LENGTH and NUMBER.fullmatch(text) else None
    if grade is None or grade != grade.to_integral_value():
        raise InputError(f"{place}: expected a whole number as grade, found {text!r:.30}")
    if abs(grade) >= GRADE_LIMIT:
        raise InputError(f"{place}: expected a grade between {-GRADE_LIMIT} and {GRADE_LIMIT}, found {text:.30}")
    return int(grade)
