"""Passages: what is embedded, indexed and shown as a search result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from index.files import InputError
from index.records import Record, UnreadRow, read_records, unread_rows

# White space, control characters, and halves of surrogate pairs (which are no characters and cannot be written).
UNFIT_FOR_IDS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# Begins a line of qrels or of a run that is a comment.
COMMENT = "#"


@dataclass(frozen=True)
class Passage:
    """A document with its id; `content` is what a tower reads, as BEIR has it."""

    id: str
    title: str
    text: str

    @property
    def content(self) -> str:
        """Title and text joined by a space, stripped (the BEIR convention)."""
        return f"{self.title} {self.text}".strip()


def heading(title: str, text: str) -> str:
    """The title to show above a text or before it: nothing where it says the same as the text."""
    return "" if title.split() == text.split() else title


def folded(text: str) -> str:
    """The text without case, and with one blank for any white space: texts that agree in it say the same."""
    return " ".join(text.casefold().split())


def one_line(title: str, text: str) -> str:
    """Title and text to show on one line."""
    return " ".join(f"{heading(title, text)} {text}".split())


def checked_id(value: object, place: str) -> str:
    """The id as text. Ids stand one a line in files and between blanks in TREC runs, so neither may be in them.

    Raises:
        InputError: `value` is no text or whole number, is empty, or holds white space, a control character or half
            of a surrogate pair.
    """
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"{place}: expected an id of text or a whole number, found {value!r:.60}")
    text = str(value)
    if not text or UNFIT_FOR_IDS.search(text):
        raise InputError(f"{place}: expected an id without white space, found {text!r:.60}")
    return text


def checked_query_id(value: object, place: str) -> str:
    """The id of a query as text: it begins lines of qrels and of runs, where # begins a comment (trec_eval 10).

    Raises:
        InputError: as `checked_id`, or it begins with #.
    """
    text = checked_id(value, place)
    if text.startswith(COMMENT):
        raise InputError(f"{place}: expected a query's id without {COMMENT} at its beginning, found {text!r:.60}")
    return text


def parse_passage(record: Record) -> Passage:
    """Read `_id` (or `id`), optional `title`, and `text` from a row.

    Raises:
        InputError: a column is missing or of the wrong type.
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
    return Passage(checked_id(fields[key], record.place), *texts)


def read_passages(path: Path) -> Iterator[Passage]:
    """Stream the passages of a JSONL, CSV, TSV or Parquet file. Duplicate ids are the store's to refuse."""
    for record in read_records(path):
        yield parse_passage(record)


class PassageFile(Iterable[Passage]):
    """The passages of a file that `read_passages` reads, from its beginning each time.

    Raises:
        InputError: at the end, the file is not what it was when this was made; what was summed before is then another.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found = file_state(path)

    def __iter__(self) -> Iterator[Passage]:
        return (read() for read in self.unread())

    def unread(self) -> Iterator[Callable[[], Passage]]:
        """Each as what reads it, for those who leave most of them to others."""
        for row in unread_rows(self.path):
            yield partial(_read, row)
        if file_state(self.path) != self._found:
            raise InputError(f"{self.path}: changed while it was read")


def file_state(path: Path) -> tuple[int, int, int] | None:
    """What a change of a file changes; none for a file that is not there, which reading it tells."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(row: UnreadRow) -> Passage:
    return parse_passage(row())
