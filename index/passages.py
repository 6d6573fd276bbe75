"""Passages: the documents that are embedded, indexed and returned by a search."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from index.fields.values import KEY, FieldValue, read_fields
from index.files import InputError
from index.records import LazyRow, Record, lazy_rows, read_records

# White space, control characters, and halves of surrogate pairs (which cannot be written as UTF-8).
UNFIT_FOR_IDS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# Lines of qrels and run files that begin with this are comments.
COMMENT = "#"


@dataclass(frozen=True)
class Passage:
    """A document and its id. `content` is the text that a tower encodes, as in BEIR."""

    id: str
    title: str
    text: str
    fields: Mapping[str, FieldValue] = field(default_factory=dict, hash=False)
    """Requested further columns of the corpus, by name; they are not encoded."""

    @property
    def content(self) -> str:
        """Title and text joined by a space, stripped (the BEIR convention)."""
        return f"{self.title} {self.text}".strip()


def heading(title: str, text: str) -> str:
    """The title to show with a text; empty if title and text are the same."""
    return "" if title.split() == text.split() else title


def folded(text: str) -> str:
    """Casefold a text and collapse its white space; texts with the same result count as the same text."""
    return " ".join(text.casefold().split())


def one_line(title: str, text: str) -> str:
    """Title and text on one line, for display."""
    return " ".join(f"{heading(title, text)} {text}".split())


def checked_id(value: object, place: str) -> str:
    """The id as text, after checking that it can be stored.

    Ids are stored one per line and separated by blanks in TREC runs, so they must not contain white space.

    Raises:
        InputError: `value` is not text or an integer, is empty, or contains white space, a control character or half of
            a surrogate pair.
    """
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"{place}: expected an id of text or a whole number, found {value!r:.60}")
    text = str(value)
    if not text or UNFIT_FOR_IDS.search(text):
        raise InputError(f"{place}: expected an id without white space, found {text!r:.60}")
    return text


def checked_query_id(value: object, place: str) -> str:
    """The id of a query as text. It is the first column of qrels and runs, where # begins a comment (trec_eval 10).

    Raises:
        InputError: as `checked_id`, or the id begins with #.
    """
    text = checked_id(value, place)
    if text.startswith(COMMENT):
        raise InputError(f"{place}: expected a query's id without {COMMENT} at its beginning, found {text!r:.60}")
    return text


def parse_passage(record: Record, field_names: Sequence[str] = ()) -> Passage:
    """Read `_id` (or `id`), optional `title`, `text`, and the fields `field_names` from a row.

    Raises:
        InputError: a column is missing or has the wrong type.
    """
    fields = record.fields
    key = "_id" if "_id" in fields else "id"
    if key not in fields:
        raise InputError(f"{record.place}: expected a column '_id' or 'id', found {', '.join(fields) or 'none'}")
    if "text" not in fields:
        raise InputError(f"{record.place}: expected a column 'text', found {', '.join(fields)}")
    texts = []
    for column in ("title", "text"):
        value = fields.get(column)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{record.place}: expected text in column '{column}', found {type(value).__name__}")
        texts.append(value or "")
    title, text = texts
    return Passage(checked_id(fields[key], record.place), title, text, read_fields(fields, field_names, record.place))


def parse_stored_passage(record: Record) -> Passage:
    """Read a line of passages of a store or an index.

    Raises:
        InputError: it is not a passage.
    """
    found = record.fields.get(KEY, {})
    if not isinstance(found, dict):
        raise InputError(f"{record.place}: expected an object in {KEY!r}, found {type(found).__name__}")
    passage = parse_passage(record)
    return Passage(passage.id, passage.title, passage.text, read_fields(found, list(found), record.place))


def read_stored_passages(path: Path) -> Iterator[Passage]:
    """Stream the passages of a file of a store or an index."""
    for record in read_records(path):
        yield parse_stored_passage(record)


def read_passages(path: Path) -> Iterator[Passage]:
    """Stream the passages of a JSONL, CSV, TSV or Parquet file. Duplicate ids are detected by the store, not here."""
    for record in read_records(path):
        yield parse_passage(record)


class PassageFile(Iterable[Passage]):
    """An iterable of the passages of a file that can be iterated more than once.

    Args:
        path: the file.
        field_names: fields to read with each passage. Default: none.
        left_out: numbers of rows that are skipped, the first row being 0. Default: none.

    Raises:
        InputError: at the end of an iteration, if the file has changed since this object was created, because a
            checksum computed before would no longer match.
    """

    def __init__(self, path: Path, field_names: Sequence[str] = (), left_out: Collection[int] = frozenset()) -> None:
        self.path = path
        self.left_out = left_out
        self.field_names = tuple(field_names)
        self._found = file_state(path)

    def __iter__(self) -> Iterator[Passage]:
        return (read() for read in self.lazy())

    def lazy(self) -> Iterator[Callable[[], Passage]]:
        """Yield functions that parse one passage each, so that a process can skip most of them."""
        for number, row in enumerate(lazy_rows(self.path)):
            if number not in self.left_out:
                yield partial(_read, row, self.field_names)
        if file_state(self.path) != self._found:
            raise InputError(f"{self.path}: changed while it was read")


def file_state(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and modification time of a file, to detect changes; None if the file does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(row: LazyRow, field_names: Sequence[str]) -> Passage:
    return parse_passage(row(), field_names)
