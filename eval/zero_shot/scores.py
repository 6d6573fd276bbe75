"""Blocked inner products whose values do not depend on the block size, and ranks with ties by index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from index.files import InputError

# Scores per block, 12 bytes each: the float64 products and their float32 values.
BLOCK_SCORES = 2**22


def blocks(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Compute inner products of blocks of rows with all columns.

    Products are summed in float64 and rounded to float32 once, so that equal vectors get equal scores in every block.

    Args:
        rows: float32 [Q, D].
        columns: float32 [N, D].

    Yields:
        A slice of q rows and their scores, float32 [q, N].
    """
    right = columns.astype(np.float64).T
    for part in parts(len(rows), len(columns)):
        yield part, (rows[part].astype(np.float64) @ right).astype(np.float32)


def parts(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows whose scores with all columns number at most BLOCK_SCORES; at least one row each."""
    at_once = max(1, BLOCK_SCORES // max(1, columns))
    for start in range(0, rows, at_once):
        yield slice(start, min(rows, start + at_once))


def ranks_of(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The rank, from 1, of one column of each row; columns are sorted by score descending, then index.

    Args:
        scores: float32 [Q, N].
        chosen: int [Q], a column of each row.

    Returns:
        int64 [Q].
    """
    own = np.take_along_axis(scores, chosen[:, None], axis=1)
    before = (scores == own) & (np.arange(scores.shape[1]) < chosen[:, None])
    return 1 + ((scores > own) | before).sum(axis=1, dtype=np.int64)


def checked(vectors: np.ndarray, what: str, dim: int | None = None) -> np.ndarray:
    """Convert embeddings to contiguous float32 [N, D] and check that they are finite.

    Args:
        vectors: the embeddings.
        what: their name in error messages.
        dim: the expected dimension D, if known.

    Raises:
        InputError: a value is NaN or infinite; the message names the row.
        ValueError: the shape is not [N, D].
    """
    result = np.ascontiguousarray(vectors, dtype=np.float32)
    if result.ndim != 2 or (dim is not None and result.shape[1] != dim):
        raise ValueError(f"{what}: expected shape [N, {dim or 'D'}], found {result.shape}")
    finite = np.isfinite(result).all(axis=1)
    if not finite.all():
        raise InputError(f"{what}: row {int(np.argmin(finite))}: expected a finite vector, found NaN or infinity")
    return result
