"""Exact nearest-neighbour search by inner product, block by block, with ties decided by id."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import distributed

from index.exact.products import SLICE_ROWS, Block, Queries, full_precision, half_type
from index.exact.top_k import Best, as_table, merge
from index.exact.windows import Shards, Window, pieces
from index.files import InputError

__all__ = ["merge", "search", "search_on_ranks"]

Each = Callable[[Callable[[Best], None], list[Best]], object]

# Passages multiplied at once.
BLOCK_ROWS = {"cpu": 16384, "cuda": 65536}
# Products that are held at once, of some queries and a block or, on a processor, a slice of one: 8 MiB in float32, and
# 1 GiB on a GPU.
PRODUCTS_AT_ONCE = {"cpu": 2**21, "cuda": 2**28}
# Results that are looked for at once: their candidates are several times as many, in several lists.
RESULTS_AT_ONCE = {"cpu": 2**20, "cuda": 2**62}
# Queries that a thread of a processor must have, to work on them by itself beside others.
QUERIES_A_THREAD = 64
# Queries whose lists are exchanged between ranks at a time.
QUERIES_AT_ONCE = 4096


def search(
    queries: np.ndarray,
    shards: Shards,
    ids: Sequence[str],
    k: int,
    *,
    block_rows: int | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` passages of highest inner product for each query, exactly.

    The score of a pair is the exact inner product of its float32 vectors, rounded to float64 and then to float32.
    Passages rank by it, descending, and among equal scores by id, descending in its UTF-8 bytes: the order of
    trec_eval, at the cut too. Block size, shards, device and precision of the products change no bit of the result:
    products are made in half precision where the device is faster at it, and only choose which pairs are scored, with
    a bound on their error; where too many pairs lie within it, float32 and in the end float64 take their place.

    Memory is constant: queries, results, two windows of vectors (256 MiB each, 1 GiB on a GPU), the products of a
    block (8 MiB a thread, 1 GiB on a GPU) and the candidates.

    Args:
        queries: [Q, D], float32.
        shards: (first row, vectors [n, D] of any floating dtype), in order and without gaps; read once. Tensors that
            lie on the device are used where they are.
        ids: the ids of the N rows, no two of them equal.
        k: how many to return, at least 1.
        block_rows: passages multiplied at once; none leaves it to the device.
        device: where the work is done, whatever the global settings of precision are.
        progress: called with the number of rows after each block.

    Returns:
        scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64, best first.

    Raises:
        InputError: a query or passage holds NaN or infinity, or the products would overflow; the message names the
            row, and the id of a passage.
        ValueError: shapes or row numbers do not fit together.
    """
    whole = _checked(shards, queries, len(ids))
    return _search(queries, whole, ids, k, block_rows, device, progress)


def search_on_ranks(
    queries: np.ndarray,
    shards: Shards,
    ids: Sequence[str],
    k: int,
    *,
    group: distributed.ProcessGroup | None = None,
    block_rows: int | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`search` by all ranks of a process group together; every rank gets the same result, that of `search`, bit by bit.

    Rank r reads the shards r, r + W, r + 2W …, then the lists of all ranks are merged. Each rank calls it with the
    same arguments but `device` and `progress`. Sends 12 bytes for each of the k passages of a query to every rank.

    Raises:
        ValueError: on every rank, when the number of queries, dimensions, results or passages differs between them.
        as `search`, on the rank that found the fault; RuntimeError on the others, which then do not wait for it.
    """
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    whole = _checked(shards, queries, len(ids))
    mine = (shard for number, shard in enumerate(whole) if number % ranks == rank)
    wire = torch.device(device if distributed.get_backend(group) == "nccl" else "cpu")
    dimension, passages = queries.shape[-1], len(ids)
    sizes = {
        "the number of queries": len(queries),
        "their dimension": dimension,
        "k": k,
        "the number of passages": passages,
    }
    _check_alike(sizes, wire, group)
    failed = torch.zeros(1, device=wire)
    try:
        scores, rows = _search(queries, mine, ids, k, block_rows, device, progress)
    except BaseException:
        failed += 1
        raise
    finally:
        distributed.all_reduce(failed, group=group)
    if failed:
        raise RuntimeError("exact search: another rank failed, and its message says why")
    width = min(k, len(ids))
    parts = []
    for start in range(0, max(1, len(queries)), QUERIES_AT_ONCE):
        some = slice(start, start + QUERIES_AT_ONCE)
        lists = zip(
            _gathered(_filled(scores[some], width, -np.inf), wire, group),
            _gathered(_filled(rows[some], width, -1), wire, group),
            strict=True,
        )
        parts.append(merge(list(lists), ids, k))
    return np.concatenate([part for part, _ in parts]), np.concatenate([part for _, part in parts])


def _search(
    queries: np.ndarray,
    shards: Shards,
    ids: Sequence[str],
    k: int,
    block_rows: int | None,
    device: str | torch.device,
    progress: Callable[[int], None] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """`search` over rows that may have gaps."""
    place = _with_number(torch.device(device))
    block_rows = BLOCK_ROWS[place.type] if block_rows is None else block_rows
    if k < 1 or block_rows < 1:
        raise ValueError(f"k, block_rows: expected numbers above 0, found {k}, {block_rows}")
    if queries.ndim != 2:
        raise ValueError(f"queries: expected shape [Q, D], found {queries.shape}")
    with full_precision(place), _team(place, len(queries)) as (members, each):
        half = half_type(place)
        vectors = torch.tensor(np.ascontiguousarray(queries, dtype=np.float32), device=place)
        largest = _largest(vectors)
        rows_at_once = min(block_rows, SLICE_ROWS.get(place.type, block_rows), max(1, len(ids)))
        at_once = min(PRODUCTS_AT_ONCE[place.type] // rows_at_once, RESULTS_AT_ONCE[place.type] // k)
        at_once = max(1, min(at_once, -(-len(vectors) // members)))
        parts = [Best(Queries(part, half), k, ids) for part in vectors.split(at_once) if len(part)]
        window: Window | None = None
        # Closed at a fault too, so that nothing goes on reading.
        with contextlib.closing(pieces(shards, block_rows, len(ids), place)) as stream:
            for piece in stream:
                if window is not None and window is not piece.window:
                    _settle(parts, window, each)
                window = piece.window
                block = Block.measured(piece.vectors, piece.first, piece.start, ids, half)
                # Half of what float32 holds, because products in half precision may exceed the exact ones a little.
                if largest * block.largest * queries.shape[1] > torch.finfo(torch.float32).max / 2:
                    last = piece.first + piece.rows - 1
                    raise InputError(f"rows {piece.first} to {last}: inner products overflow float32")
                window.enter(piece.start, piece.first, piece.rows, block.norm)
                each(partial(Best.update, block=block, window=window), parts)
                if progress is not None:
                    progress(piece.rows)
        if window is not None:
            _settle(parts, window, each)
        tables = [as_table(part.query, part.score, part.row, part.count) for part in parts]
    if not tables:
        return np.empty((0, min(k, len(ids))), np.float32), np.empty((0, min(k, len(ids))), np.int64)
    return np.concatenate([scores for scores, _ in tables]), np.concatenate([rows for _, rows in tables])


def _settle(parts: list[Best], window: Window, each: Each) -> None:
    each(partial(Best.settle, window=window), parts)
    window.release()


@contextlib.contextmanager
def _team(place: torch.device, queries: int) -> Iterator[tuple[int, Each]]:
    """How many share the queries, and what does something with each part of them.

    On a processor threads of our own take a part each. torch's would wait for each other at every product, and what
    chooses and scores candidates would keep one of them busy and the others not.
    """
    threads = torch.get_num_threads()
    if place.type != "cpu" or threads == 1 or queries < threads * QUERIES_A_THREAD:
        yield 1, _one_by_one
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            # Each thread enters inference mode for itself.
            yield threads, lambda work, parts: deque(pool.map(torch.inference_mode()(work), parts), maxlen=0)
        finally:
            torch.set_num_threads(threads)


def _one_by_one(work: Callable[[Best], None], parts: list[Best]) -> None:
    for part in parts:
        work(part)


def _checked(shards: Shards, queries: np.ndarray, rows: int) -> Iterator[tuple[int, Any]]:
    """The shards, which must follow each other and be as many rows as `rows`."""
    seen = 0
    for first, vectors in shards:
        if first != seen or first + len(vectors) > rows or vectors.shape[1:] != queries.shape[1:]:
            raise ValueError(
                f"shards: expected vectors of {queries.shape[1]} dimensions for rows from {seen} up to {rows}, "
                f"found {tuple(vectors.shape)} at row {first}"
            )
        yield first, vectors
        seen += len(vectors)
    if seen != rows:
        raise ValueError(f"shards: expected {rows} rows, one for each id, found {seen}")


def _largest(queries: torch.Tensor) -> float:
    """The largest magnitude in `queries` [Q, D], which must be finite."""
    if not queries.numel():
        return 0.0
    smallest, largest = (float(value) for value in torch.aminmax(queries))
    magnitude = max(abs(smallest), abs(largest))
    if not np.isfinite(magnitude):
        row = int(queries.isfinite().all(dim=1).int().argmin())
        raise InputError(f"query {row}: expected a finite vector, found NaN or infinity")
    return magnitude


def _with_number(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`, the name that tensors give."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_alike(sizes: dict[str, int], device: torch.device, group: distributed.ProcessGroup | None) -> None:
    """Refuse ranks that would exchange lists of other lengths, or would not look for the same."""
    found = list(_gathered(torch.tensor(list(sizes.values())), device, group))
    for name, values in zip(sizes, np.stack(found, axis=1).tolist(), strict=True):
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(f"{name} differs between ranks: {values[0]} on rank 0, {values[other]} on rank {other}")


def _filled(table: np.ndarray, width: int, value: float) -> torch.Tensor:
    whole = np.full((len(table), width), value, table.dtype)
    whole[:, : table.shape[1]] = table
    return torch.from_numpy(whole)


def _gathered(
    table: torch.Tensor, device: torch.device, group: distributed.ProcessGroup | None
) -> Iterable[np.ndarray]:
    table = table.to(device)
    tables = [torch.empty_like(table) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(tables, table, group=group)
    return [one.cpu().numpy() for one in tables]
