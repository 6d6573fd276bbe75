"""Near-duplicates equal those of a full matrix of cosines, whatever the tiles, and are grouped by chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from index.exact import near_duplicates as module
from index.exact.near_duplicates import near_duplicates
from index.files import InputError

Shards = Callable[[], Iterator[tuple[int, np.ndarray]]]


def shards_of(vectors: np.ndarray, rows: int) -> Shards:
    return lambda: ((first, vectors[first : first + rows]) for first in range(0, len(vectors), rows))


def names(count: int) -> list[str]:
    return [f"id {number}" for number in range(count)]


def clusters(count: int, centers: int, noise: float) -> np.ndarray:
    generator = np.random.default_rng(count)
    vectors = generator.normal(size=(centers, 24))[generator.integers(centers, size=count)]
    vectors += noise * generator.normal(size=vectors.shape)
    # Lengths do not matter.
    return (vectors * generator.uniform(0.1, 9, size=(count, 1))).astype(np.float32)


def oracle(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Score and row of the nearest other row, and the first row of each group, from the full matrix."""
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    cosines = (exact @ exact.T).astype(np.float32)
    np.fill_diagonal(cosines, -1)
    linked = cosines >= np.float32(threshold)
    group = list(range(len(vectors)))
    for row in range(len(vectors)):
        # Flood fill from each row that is in no group yet.
        stack = [row] if group[row] == row else []
        while stack:
            for other in np.flatnonzero(linked[stack.pop()]).tolist():
                if group[other] > row:
                    group[other] = row
                    stack.append(other)
    score = np.where(linked.any(axis=1), cosines.max(axis=1), -1)
    return score, cosines, group


@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_equal_to_the_full_matrix_for_every_size_of_tiles(
    tile: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILE_ROWS", {"cpu": tile})
    monkeypatch.setattr(module, "WINDOW_ROWS", {"cpu": max(3, 2 * tile)})
    monkeypatch.setattr(module, "PRODUCTS_AT_ONCE", 100)
    vectors = clusters(61, 20, 0.1).astype(dtype)
    compared: list[int] = []
    found = near_duplicates(shards_of(vectors, 23), names(61), 0.98, progress=compared.append)
    score, cosines, group = oracle(vectors, 0.98)
    assert sum(compared) == 61 * 60 // 2
    assert found.group.tolist() == group
    assert np.allclose(found.score, score, atol=2e-7)
    assert ((found.nearest < 0) == (score < 0)).all() and 1 < (score > 0).sum() < 61
    rows = np.flatnonzero(score > 0)
    assert np.allclose(cosines[rows, found.nearest[rows]], score[rows], atol=2e-7)


def test_copies_are_found_at_1_and_the_first_of_equals_is_the_nearest() -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    vectors = np.stack([one, other, one * 8, one, -other, other])
    found = near_duplicates(shards_of(vectors, 6), names(6), 1.0)
    assert found.score.tolist() == [1, 1, 1, 1, -1, 1]
    assert found.nearest.tolist() == [2, 5, 0, 0, -1, 1]
    assert [group.tolist() for group in found.groups()] == [[0, 2, 3], [1, 5]]


def test_a_chain_is_one_group() -> None:
    angles = np.array([0.0, 2.0, 0.1, 0.2, 0.3])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = near_duplicates(shards_of(vectors, 2), names(5), np.cos(0.11))
    assert found.group.tolist() == [0, 1, 0, 0, 0]


def test_memory_does_not_grow_with_the_number_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ROWS", {"cpu": 50})
    monkeypatch.setattr(module, "PRODUCTS_AT_ONCE", 100)
    kept: list[int] = []
    add = module._Components.add

    def watched(self: module._Components, rows: np.ndarray, others: np.ndarray) -> None:
        add(self, rows, others)
        kept.append(self._count)

    monkeypatch.setattr(module._Components, "add", watched)
    # 79,800 pairs of copies.
    found = near_duplicates(shards_of(np.ones((400, 3), np.float32), 400), names(400), 0.9)
    assert (found.group == 0).all() and (found.score == 1).all()
    # A tile has 2,500 pairs.
    assert max(kept) <= 400 + 2500 and sum(kept) < 20_000


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_is_refused_by_row_and_id(value: float) -> None:
    vectors = np.ones((5, 3), np.float32)
    vectors[3] = value
    with pytest.raises(InputError, match="row 3, 'id 3': expected a vector with a direction, found"):
        near_duplicates(shards_of(vectors, 2), names(5), 0.9)


def test_one_row_has_no_duplicate() -> None:
    found = near_duplicates(shards_of(np.ones((1, 2), np.float32), 1), names(1), 0.5)
    assert list(found.groups()) == [] and found.nearest.tolist() == [-1]
