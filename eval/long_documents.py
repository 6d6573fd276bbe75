"""Documents longer than a model reads, scored by their best window (Dai and Callan 2019, MaxP, arXiv:1905.09217)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# What a store says in its source when its rows are windows.
WINDOWS = "windows"
# Between a document's id and its window's number; the sign for a unit separator, which no id is likely to hold.
MARK = "\N{SYMBOL FOR UNIT SEPARATOR}"


def window_id(document: str, number: int) -> str:
    """The id of a document's window, counted from 0."""
    return f"{document}{MARK}{number}"


def documents_of(window_ids: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The documents that windows belong to, and for each window the row of its document, int64 [windows].

    The windows of a document stand together, as they are written.
    """
    documents: list[str] = []
    rows = np.empty(len(window_ids), dtype=np.int64)
    for row, id_ in enumerate(window_ids):
        document = id_.rpartition(MARK)[0]
        if not documents or documents[-1] != document:
            documents.append(document)
        rows[row] = len(documents) - 1
    return documents, rows


def best_of_windows(
    find: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]], document_of_row: np.ndarray
) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """A search for documents from a search for windows: a document's score is the highest of its windows.

    Windows are asked for until k documents are certain: the k-th one's score lies above the last window's, or there
    are no more windows. Of documents that tie with the k-th, all are returned, so more than k may come.

    Args:
        find: (queries [M, D], k) -> scores, rows [M, K] of windows, best first; -1 for no window.
        document_of_row: int [windows].
    """
    windows = len(document_of_row)
    documents = int(document_of_row.max(initial=-1)) + 1

    def find_documents(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        k = min(k, documents)
        # What the mean number of windows asks for, and half as much again.
        depth = min(windows, -(-3 * k * windows // (2 * max(1, documents))))
        pieces: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        waiting = np.arange(len(queries))
        while len(waiting):
            scores, rows = find(queries[waiting], depth)
            of_place = np.where(rows >= 0, document_of_row[rows], -1)
            certain = np.zeros(len(waiting), dtype=bool)
            for place, query in enumerate(waiting.tolist()):
                best = _first_places(of_place[place])
                enough = len(best) >= k and scores[place, best[k - 1]] > scores[place, -1]
                # Fewer windows than asked for: an approximate search has no more.
                certain[place] = enough or depth == windows or rows[place, -1] < 0
                if certain[place]:
                    pieces[query] = scores[place, best], of_place[place, best]
            waiting, depth = waiting[~certain], min(windows, 2 * depth)
        return _table([pieces[query] for query in range(len(queries))], k)

    return find_documents


def _first_places(documents: np.ndarray) -> np.ndarray:
    """Where each document comes first in a ranking, in its order; -1 is none."""
    _, first = np.unique(documents, return_index=True)
    first.sort()
    return first[documents[first] >= 0]


def _table(pieces: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of every query as arrays, down to the last that ties with the k-th."""
    widths = [len(scores) if len(scores) <= k else int((scores >= scores[k - 1]).sum()) for scores, _ in pieces]
    scores = np.full((len(pieces), max(widths, default=0)), -np.inf, np.float32)
    rows = np.full(scores.shape, -1, np.int64)
    for place, (width, (found, documents)) in enumerate(zip(widths, pieces, strict=True)):
        scores[place, :width], rows[place, :width] = found[:width], documents[:width]
    return scores, rows
