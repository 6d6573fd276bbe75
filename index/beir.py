"""BEIR folders: corpus.jsonl, queries.jsonl and qrels/{split}.tsv, plain or .gz, and their Parquet form on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from index.files import InputError
from index.passages import COMMENT, Passage, checked_id, checked_query_id, read_passages
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
# Grades are stored as 64-bit integers; no data set in use has larger ones.
GRADE_LIMIT = 2**31
MAX_GRADE_LENGTH = 24


def beir_file(folder: Path, name: str) -> Path:
    """The file `name` of a BEIR folder: `name`, `name`.gz, or its Parquet file.

    Parquet data sets on the Hugging Face Hub, such as NanoBEIR, have one folder each for corpus, queries and qrels,
    with one Parquet file. If the folder of qrels has several files, the split selects one by file name; a single file
    is used whatever its name is.

    Raises:
        InputError: no such file exists, or more than one.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    part, _, split = name.partition("/")
    table = folder / f"{part.removesuffix('.jsonl')}.parquet"
    if not split and table.is_file():
        return table
    files = sorted((folder / part.removesuffix(".jsonl")).glob("*.parquet"))
    if len(files) > 1 and split:
        wanted = split.removesuffix(".tsv")
        files = [path for path in files if path.stem == wanted or path.name.startswith(f"{wanted}-")]
    if len(files) > 1:
        raise InputError(f"{files[0].parent}: expected one Parquet file, found {len(files)}; write them as one {name}")
    if not files:
        raise InputError(f"{folder}: expected {name} or {name}.gz, found neither")
    return files[0]


def is_beir_folder(path: Path) -> bool:
    """Whether `path` is a folder with a corpus and queries."""
    try:
        return path.is_dir() and bool(beir_file(path, "corpus.jsonl") and beir_file(path, "queries.jsonl"))
    except InputError:
        # A folder with several Parquet files counts too: the error is reported when it is opened.
        return any((path / "corpus").glob("*.parquet"))


@dataclass(frozen=True)
class BeirDataset:
    """One split of a BEIR folder: its judged queries in memory, its corpus as a stream."""

    name: str
    folder: Path
    split: str
    queries: dict[str, str]
    """Query id -> text of the judged queries of the split, in the order of the qrels."""
    qrels: Qrels
    dangling: bool = False
    """Whether qrels may judge passages and queries that do not exist. Such passages are never retrieved, and such
    queries count as 0, as in trec_eval.
    """

    @classmethod
    def open(cls, folder: Path | str, split: str = "test", *, dangling: bool = False) -> BeirDataset:
        """Read the queries and qrels of a split.

        Args:
            folder: the BEIR folder.
            split: name of the qrels file, without suffix.
            dangling: accept qrels of queries and passages that do not exist.

        Raises:
            InputError: a file is missing or malformed, the qrels are empty, or, unless `dangling`, a judged query has
                no text.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        qrels_path = beir_file(folder, f"qrels/{split}.tsv")
        qrels = read_qrels(qrels_path)
        if not qrels:
            raise InputError(f"{qrels_path}: expected judgements, found none")
        queries_path = beir_file(folder, "queries.jsonl")
        queries = read_queries(queries_path)
        missing = qrels.keys() - queries.keys()
        if missing and (not dangling or len(missing) == len(qrels)):
            raise _missing_ids_error(qrels_path, QUERY, missing, f"ids of {queries_path.name}")
        judged = {query: queries[query] for query in qrels if query in queries}
        return cls(folder.resolve().name, folder, split, judged, qrels, dangling)

    @property
    def corpus_file(self) -> Path:
        """Path of corpus.jsonl, corpus.jsonl.gz or its Parquet file."""
        return beir_file(self.folder, "corpus.jsonl")

    @property
    def qrels_file(self) -> Path:
        """Path of qrels/{split}.tsv, its .gz or its Parquet file."""
        return beir_file(self.folder, f"qrels/{self.split}.tsv")

    def passages(self) -> Iterator[Passage]:
        """Stream the corpus."""
        return read_passages(self.corpus_file)

    @property
    def judged(self) -> set[str]:
        """Ids of all passages that the split judges."""
        return {passage for grades in self.qrels.values() for passage in grades}

    def check(self, corpus_ids: Iterable[str]) -> None:
        """Check that the corpus contains every judged passage, unless `dangling`.

        Raises:
            InputError: passages are missing; the message names the first, its line, and how many there are.
        """
        known = corpus_ids if isinstance(corpus_ids, set | frozenset | dict) else set(corpus_ids)
        missing = {passage for passage in self.judged if passage not in known}
        if missing and not self.dangling:
            raise _missing_ids_error(self.qrels_file, PASSAGE, missing, "passage ids of the corpus")


def _missing_ids_error(path: Path, column: int, missing: Collection[str], wanted: str) -> InputError:
    # Qrels that were created in memory may differ from those of the file.
    id_, place = next(iter(first_locations(path, column, missing, most=1).items()), (min(missing), str(path)))
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return InputError(f"{place}: expected {wanted}, found {id_}, which is not there{more}")


def read_queries(path: Path) -> dict[str, str]:
    """Read queries (id -> text) from a file with columns `_id` (or `id`) and `text`.

    The file may be .jsonl, .jsonl.gz, .csv, .tsv or .parquet.

    Raises:
        InputError: the file is missing or malformed, an id occurs twice, or a query has no text; the message names the
            line.
    """
    queries: dict[str, str] = {}
    for record in read_records(path):
        query, text = parse_query(record)
        if query in queries:
            raise InputError(f"{record.place}: expected each query id once, found {query} again")
        queries[query] = text
    return queries


def parse_query(record: Record) -> tuple[str, str]:
    """Id and text of a row.

    Raises:
        InputError: a column is missing, the id is invalid, or the text is empty.
    """
    fields = record.fields
    key = "_id" if "_id" in fields else "id"
    for column in (key, "text"):
        if column not in fields:
            wanted = "'_id' or 'id'" if column == key else "'text'"
            raise InputError(f"{record.place}: expected a column {wanted}, found {', '.join(fields) or 'none'}")
    query, text = checked_query_id(fields[key], record.place), fields["text"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{record.place}: expected text for query {query}, found {text!r:.60}")
    return query, text


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
    """What is wrong with a first line that is no header and cannot be a judgement; empty for one that can."""
    last = columns[-1].strip("\"'").casefold()
    # A line of another width, or with a value that is no grade, is a broken judgement.
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
