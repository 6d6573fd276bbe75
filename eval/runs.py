"""TREC run files: one line `query Q0 passage rank score tag` per ranked passage."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eval.ranking import RankedRun
from index.files import InputError, atomic_path
from index.passages import COMMENT, checked_id, checked_query_id
from index.records import read_lines

COLUMNS = "query Q0 passage rank score tag"


def write_trec_run(path: Path, run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Write a run file atomically, in trec_eval's order, with ranks from 1.

    Scores are float32, as trec_eval compares them, and written with nine digits, so that reading the file restores them
    exactly.

    Args:
        path: the file to write.
        run: query id -> passage id -> score.
        tag: the name of the system, for the last column.

    Raises:
        InputError: an id or the tag is empty or contains white space, a query id begins with # (its lines would be
            comments), or a score is NaN.
    """
    checked_id(tag, f"{path}: tag")
    ranked = RankedRun.of(run)
    for query in ranked.queries:
        checked_query_id(query, f"{path}: query")
    for row in np.unique(ranked.rows[ranked.rows >= 0]).tolist():
        checked_id(ranked.passages[row], f"{path}: passage")
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for query, rows, scores in zip(ranked.queries, ranked.rows, ranked.scores, strict=True):
            found = zip(rows[rows >= 0].tolist(), scores.tolist(), strict=False)
            stream.writelines(
                f"{query} Q0 {ranked.passages[row]} {rank} {score:.9g} {tag}\n"
                for rank, (row, score) in enumerate(found, start=1)
            )


def read_trec_run(path: Path) -> RankedRun:
    """Read a TREC run file, also gzip-compressed (.gz).

    As in trec_eval, scores determine the order and the rank column is ignored. A line that begins with # is a comment,
    as in trec_eval 10.

    Raises:
        InputError: the file is missing, or a line has the wrong number of columns, a rank or score that is not a
            number, or a passage that its query already has. The message names the line.
    """
    lines = _Lines(path)
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip() and not line.lstrip().startswith(COMMENT):
            lines.add(line, number)
    return lines.run()


class _Lines:
    """The lines of a run file as columns, 24 bytes per line; each id is stored once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._query_of: dict[str, int] = {}
        self._row_of: dict[str, int] = {}
        self._queries, self._rows, self._scores, self._numbers = array("i"), array("i"), array("d"), array("q")

    def add(self, line: str, number: int) -> None:
        columns = line.split()
        place = f"{self._path}:{number}"
        if len(columns) != 6:
            raise InputError(f"{place}: expected 6 columns ({COLUMNS}), found {len(columns)}")
        query, _, passage, rank, score_text, _ = columns
        try:
            int(rank)
            # Python allows _ between digits, and digits of other scripts.
            if "_" in score_text or not score_text.isascii():
                raise ValueError
            score = float(score_text)
        except ValueError:
            found = f"{rank!r:.30} {score_text!r:.30}"
            raise InputError(f"{place}: expected a whole rank and a score, found {found}") from None
        if math.isnan(score):
            raise InputError(f"{place}: expected a number as score, found NaN")
        self._queries.append(self._query_of.setdefault(query, len(self._query_of)))
        self._rows.append(self._row_of.setdefault(passage, len(self._row_of)))
        self._scores.append(score)
        self._numbers.append(number)

    def run(self) -> RankedRun:
        queries, rows = np.array(self._queries, dtype=np.int64), np.array(self._rows, dtype=np.int64)
        scores = np.array(self._scores)
        names, passages = list(self._query_of), list(self._row_of)
        # Sort by query, then passage, then line, so that repeated pairs are adjacent.
        order = np.lexsort((rows, queries))
        queries, rows, scores = queries[order], rows[order], scores[order]
        twice = (queries[1:] == queries[:-1]) & (rows[1:] == rows[:-1])
        if twice.any():
            number, second = min((self._numbers[order[i + 1]], i + 1) for i in np.flatnonzero(twice).tolist())
            found = f"found {passages[rows[second]]} again for query {names[queries[second]]}"
            raise InputError(f"{self._path}:{number}: expected each passage once per query, {found}")
        counts = np.bincount(queries, minlength=len(names))
        places = np.arange(len(queries)) - np.repeat(counts.cumsum() - counts, counts)
        table = np.full((len(names), int(counts.max(initial=0))), -1, np.int64)
        values = np.full(table.shape, -np.inf)
        table[queries, places], values[queries, places] = rows, scores
        return RankedRun(names, passages, table, values)
