"""BEIR folders: corpus.jsonl, queries.jsonl and qrels/{split}.tsv, each plain or .gz."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from eval.metrics import Qrels
from index.files import InputError
from index.passages import Passage, checked_id, read_passages
from index.records import Record, open_text, read_records

QUERY_HEADS = ("query-id", "queryid", "query", "qid", "topic")
GRADE_HEADS = ("score", "relevance", "rel", "label", "grade")


def beir_file(folder: Path, name: str) -> Path:
    """The file `name` of a BEIR folder, or `name`.gz where only that is there.

    Raises:
        InputError: neither is there.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: expected {name} or {name}.gz, found neither")


@dataclass(frozen=True)
class BeirDataset:
    """One split of a BEIR folder: its judged queries in memory, its corpus as a stream."""

    name: str
    folder: Path
    split: str
    queries: dict[str, str]
    """Query id -> text, of the split's judged queries only, in the order of the qrels."""
    qrels: Qrels

    @classmethod
    def open(cls, folder: Path | str, split: str = "test") -> BeirDataset:
        """Read the queries and qrels of a split.

        Raises:
            InputError: a file is missing or broken, the qrels are empty, or a judged query has no text.
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
        lost = [query for query in qrels if query not in queries]
        if lost:
            raise InputError(f"{qrels_path}: expected ids of {queries_path.name}, found {_first_of(lost)}")
        return cls(folder.resolve().name, folder, split, {query: queries[query] for query in qrels}, qrels)

    @property
    def corpus_file(self) -> Path:
        """corpus.jsonl or corpus.jsonl.gz."""
        return beir_file(self.folder, "corpus.jsonl")

    def passages(self) -> Iterator[Passage]:
        """Stream the corpus."""
        return read_passages(self.corpus_file)

    @property
    def judged(self) -> set[str]:
        """Ids of all passages that the split judges."""
        return {passage for grades in self.qrels.values() for passage in grades}

    def check(self, corpus_ids: Iterable[str]) -> None:
        """Refuse qrels that judge passages the corpus lacks.

        Raises:
            InputError: names the first such passage and their number.
        """
        known = corpus_ids if isinstance(corpus_ids, set | frozenset | dict) else set(corpus_ids)
        lost = sorted(passage for passage in self.judged if passage not in known)
        if lost:
            path = beir_file(self.folder, f"qrels/{self.split}.tsv")
            raise InputError(f"{path}: expected passage ids of the corpus, found {_first_of(lost)}")


def _first_of(lost: list[str]) -> str:
    return f"{lost[0]}, which is not there" + (f" (and {len(lost) - 1} more)" if len(lost) > 1 else "")


def read_queries(path: Path) -> dict[str, str]:
    """Query id -> text from a queries.jsonl[.gz] (or .csv, .tsv, .parquet) with `_id` (or `id`) and `text`.

    Raises:
        InputError: the file is missing or broken, an id comes twice, or a query has no text; names the line.
    """
    queries: dict[str, str] = {}
    for record in read_records(path):
        query, text = _parse_query(record)
        if query in queries:
            raise InputError(f"{record.place}: expected each query id once, found {query} again")
        queries[query] = text
    return queries


def _parse_query(record: Record) -> tuple[str, str]:
    fields = record.fields
    key = "_id" if "_id" in fields else "id"
    for column in (key, "text"):
        if column not in fields:
            wanted = "'_id' or 'id'" if column == key else "'text'"
            raise InputError(f"{record.place}: expected a column {wanted}, found {', '.join(fields) or 'none'}")
    query, text = checked_id(fields[key], record.place), fields["text"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{record.place}: expected text for query {query}, found {text!r:.60}")
    return query, text


def read_qrels(path: Path) -> Qrels:
    """Read qrels: BEIR's `query passage grade` or TREC's `query 0 passage grade`, between tabs or blanks.

    The first line is data unless it is literally a header (query-id, corpus-id, score). The same judgement twice is
    one judgement; two different grades for one pair are refused. Grades are whole numbers.

    Raises:
        InputError: the file is missing or a line is broken; the message names the line.
    """
    qrels: Qrels = {}
    width = 0
    with open_text(path) as stream:
        number = 0
        try:
            for number, line in enumerate(stream, start=1):
                columns = line.split()
                if not columns or (number == 1 and _is_header(columns)):
                    continue
                _add_judgement(qrels, columns, width, f"{path}:{number}")
                width = len(columns)
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}:{number + 1}: cannot be read: {error}") from None
    return qrels


def _is_header(columns: list[str]) -> bool:
    heads = [column.casefold().replace("_", "-") for column in columns]
    return heads[0] in QUERY_HEADS and heads[-1] in GRADE_HEADS


def _add_judgement(qrels: Qrels, columns: list[str], width: int, place: str) -> None:
    if len(columns) not in (3, 4) or (width and len(columns) != width):
        wanted = width or "3 (query, passage, grade) or 4 (query, 0, passage, grade)"
        raise InputError(f"{place}: expected {wanted} columns, found {len(columns)}")
    query, passage, grade_text = columns[0], columns[-2], columns[-1]
    if not re.fullmatch(r"[+-]?[0-9]+", grade_text):
        raise InputError(f"{place}: expected a whole number as grade, found {grade_text!r:.30}")
    grade = int(grade_text)
    if qrels.setdefault(query, {}).setdefault(passage, grade) != grade:
        found = f"{qrels[query][passage]} and {grade}"
        raise InputError(f"{place}: expected one grade for query {query}, passage {passage}, found {found}")
