"""Inner products that do not depend on how they are cut into blocks, and the one order that ranks go by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from index.files import InputError

# Scores held at once, 12 bytes each: the float64 products and what they are rounded to.
SCORES_AT_ONCE = 2**22


def blocks(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Inner products of some rows at a time with all columns, float32.

    They are summed in float64 and rounded once, so that equal vectors score equal wherever a block begins.

    Args:
        rows: [Q, D], float32.
        columns: [N, D], float32.

    Yields:
        which rows, and their scores [q, N].
    """
    right = columns.astype(np.float64).T
    for part in parts(len(rows), len(columns)):
        yield part, (rows[part].astype(np.float64) @ right).astype(np.float32)


def parts(rows: int, columns: int) -> Iterator[slice]:
    """The rows in groups whose scores with all columns fit into SCORES_AT_ONCE; one row at a time at the least."""
    at_once = max(1, SCORES_AT_ONCE // max(1, columns))
    for start in range(0, rows, at_once):
        yield slice(start, min(rows, start + at_once))


def ranks_of(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The place of one column of each row, from 1, when columns go by score, descending, and then by their number.

    Args:
        scores: [Q, N], float32.
        chosen: [Q], a column of each row.

    Returns:
        int64 [Q].
    """
    own = np.take_along_axis(scores, chosen[:, None], axis=1)
    before = (scores == own) & (np.arange(scores.shape[1]) < chosen[:, None])
    return 1 + ((scores > own) | before).sum(axis=1, dtype=np.int64)


def checked(vectors: np.ndarray, what: str, dim: int | None = None) -> np.ndarray:
    """Embeddings as float32 [N, D], refused where they are no such thing.

    Raises:
        InputError: a value is NaN or infinite; the message names its row.
        ValueError: another shape.
    """
    found = np.ascontiguousarray(vectors, dtype=np.float32)
    if found.ndim != 2 or (dim is not None and found.shape[1] != dim):
        raise ValueError(f"{what}: expected shape [N, {dim or 'D'}], found {found.shape}")
    finite = np.isfinite(found).all(axis=1)
    if not finite.all():
        raise InputError(f"{what}: row {int(np.argmin(finite))}: expected a finite vector, found NaN or infinity")
    return found
