"""MaxP: long documents scored by their best window (Dai and Callan 2019, arXiv:1905.09217)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Key in the `source` of a store whose rows are windows.
WINDOWS = "windows"
# Separates a document's id from the number of its window; a character that is unlikely to occur in ids.
WINDOW_SEPARATOR = "\N{SYMBOL FOR UNIT SEPARATOR}"


def window_id(document: str, number: int) -> str:
    """The id of window `number` of a document, counted from 0."""
    return f"{document}{WINDOW_SEPARATOR}{number}"


def documents_of(window_ids: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Group windows by document.

    Args:
        window_ids: ids of windows; the windows of a document are contiguous.

    Returns:
        The document ids, and for each window the row of its document, int64 [windows].
    """
    documents: list[str] = []
    rows = np.empty(len(window_ids), dtype=np.int64)
    for row, id_ in enumerate(window_ids):
        document = id_.rpartition(WINDOW_SEPARATOR)[0]
        if not documents or documents[-1] != document:
            documents.append(document)
        rows[row] = len(documents) - 1
    return documents, rows


def best_of_windows(
    find: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]], document_of_row: np.ndarray
) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """Turn a search for windows into a search for documents: the score of a document is its maximum over windows.

    More windows are retrieved until the top k documents are certain: the score of the k-th document is above that of
    the last window, or there are no more windows. All documents that tie with the k-th are returned, so a query may
    get more than k.

    Args:
        find: (queries [M, D], k) -> scores and window rows [M, K], best first, padded with row -1.
        document_of_row: int [windows], the document of each window.

    Returns:
        A search function (queries [M, D], k) -> scores float32 and document rows int64, padded with row -1.
    """
    windows = len(document_of_row)
    documents = int(document_of_row.max(initial=-1)) + 1

    def find_documents(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        k = min(k, documents)
        # 1.5 times the mean number of windows of k documents.
        depth = min(windows, -(-3 * k * windows // (2 * max(1, documents))))
        results: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        pending = np.arange(len(queries))
        while len(pending):
            scores, rows = find(queries[pending], depth)
            documents_found = np.where(rows >= 0, document_of_row[rows], -1)
            certain = np.zeros(len(pending), dtype=bool)
            for position, query in enumerate(pending.tolist()):
                best = _first_occurrences(documents_found[position])
                k_certain = len(best) >= k and scores[position, best[k - 1]] > scores[position, -1]
                # Padding: an approximate search has no more windows.
                certain[position] = k_certain or depth == windows or rows[position, -1] < 0
                if certain[position]:
                    results[query] = scores[position, best], documents_found[position, best]
            pending, depth = pending[~certain], min(windows, 2 * depth)
        return _stack([results[query] for query in range(len(queries))], k)

    return find_documents


def _first_occurrences(documents: np.ndarray) -> np.ndarray:
    """Positions of the first occurrence of each document in a ranking; ignores -1."""
    _, first = np.unique(documents, return_index=True)
    first.sort()
    return first[documents[first] >= 0]


def _stack(results: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Stack the results of all queries into padded arrays, each cut after the last tie with the k-th score."""
    widths = [len(scores) if len(scores) <= k else int((scores >= scores[k - 1]).sum()) for scores, _ in results]
    scores = np.full((len(results), max(widths, default=0)), -np.inf, np.float32)
    rows = np.full(scores.shape, -1, np.int64)
    for position, (width, (found, documents)) in enumerate(zip(widths, results, strict=True)):
        scores[position, :width], rows[position, :width] = found[:width], documents[:width]
    return scores, rows
