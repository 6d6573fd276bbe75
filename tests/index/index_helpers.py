from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from index.passages import Passage
from index.store.writer import EmbeddingWriter

MODEL = {"sha256": "ab" * 32}


def passages_of(ids: list[str]) -> list[Passage]:
    return [Passage(id_, f"title {id_}", f"text of {id_}\nsecond line \u2028 é") for id_ in ids]


def listing(folder: Path) -> dict[str, bytes]:
    """Map every file name in `folder` to its bytes."""
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def flipped_bytes(folder: Path, rng: np.random.Generator, places: int = 20) -> Iterator[str]:
    """Flip one bit at a time, at the ends, in the middle and at random positions of every file; yield the file name."""
    for name, data in listing(folder).items():
        for place in {0, len(data) // 2, len(data) - 1, *rng.integers(len(data), size=places).tolist()}:
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(8))
            (folder / name).write_bytes(damaged)
            yield name
        (folder / name).write_bytes(data)


def shards_of(passages: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    """Split `passages` [N, D] into shards of `size` rows, as exact search reads them."""
    return [(start, passages[start : start + size]) for start in range(0, len(passages), size)]


def same_bits(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Assert that scores and rows are equal bit for bit (-0.0 differs from 0.0)."""
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0].view(np.int32), expected[0].view(np.int32))


def pairs_of(found: tuple[np.ndarray, np.ndarray]) -> list[list[tuple[str, float]]]:
    """What `Index.search` found, as (id, score) pairs for each query."""
    scores, ids = found
    return [
        [(id_, score) for id_, score in zip(some_ids, some_scores, strict=True) if score > -np.inf]
        for some_ids, some_scores in zip(ids.tolist(), scores.tolist(), strict=True)
    ]


HEADER: dict[str, Any] = {"dim": 3, "model": MODEL, "source": {"file": "c.jsonl"}, "shard_rows": 4}


def five_rows(folder: Path, complete: bool) -> Path:
    """Write a complete shard and one more row; an interrupted run keeps only the shard."""
    writer = EmbeddingWriter(folder, **HEADER)
    writer.append(passages_of(list("abcde")), np.arange(15).reshape(5, 3))
    if complete:
        writer.close()
    else:
        writer.__exit__(RuntimeError, None, None)
    return folder
