"""TREC run files: `query Q0 passage rank score tag`, a ranked passage a line."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

from eval.metrics import Run, trec_order
from index.files import InputError, atomic_path
from index.passages import checked_id
from index.records import open_text

COLUMNS = "query Q0 passage rank score tag"


def write_trec_run(path: Path, run: Run, tag: str) -> None:
    """Write a run atomically, each query's passages in trec_eval's order, ranks from 1.

    Scores carry nine digits, which bring every float32 back exactly, so that the file scores as the run does.

    Raises:
        InputError: an id or the tag is empty or holds white space, or a score is not a number.
    """
    checked_id(tag, f"{path}: tag")
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for query, scores in run.items():
            checked_id(query, f"{path}: query")
            for rank, (passage, score) in enumerate(trec_order(scores), start=1):
                checked_id(passage, f"{path}: passage of query {query}")
                if math.isnan(score):
                    raise InputError(f"{path}: expected a number for query {query}, passage {passage}, found NaN")
                stream.write(f"{query} Q0 {passage} {rank} {score:.9g} {tag}\n")


def read_trec_run(path: Path) -> Run:
    """Read a TREC run file (.gz too). As in trec_eval the order comes from the scores; the rank column is not used.

    Raises:
        InputError: the file is missing or a line is broken: the wrong number of columns, a rank or score that is no
            number, or a passage that its query already has. The message names the line.
    """
    run: Run = {}
    with open_text(path) as stream:
        number = 0
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    _add_line(run, line, f"{path}:{number}")
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}:{number + 1}: cannot be read: {error}") from None
    return run


def _add_line(run: Run, line: str, place: str) -> None:
    columns = line.split()
    if len(columns) != 6:
        raise InputError(f"{place}: expected 6 columns ({COLUMNS}), found {len(columns)}")
    query, _, passage, rank, score_text, _ = columns
    try:
        int(rank)
        score = float(score_text)
    except ValueError:
        raise InputError(f"{place}: expected a whole rank and a score, found {rank!r:.30} {score_text!r:.30}") from None
    if math.isnan(score):
        raise InputError(f"{place}: expected a number as score, found NaN")
    ranked = run.setdefault(query, {})
    if passage in ranked:
        raise InputError(f"{place}: expected each passage once a query, found {passage} again for query {query}")
    ranked[passage] = score
