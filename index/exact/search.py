"""Exact search by inner product, block by block; ties are broken by id."""

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
from index.exact.top_k import TopK, merge, to_arrays
from index.exact.windows import Shards, Window, pieces
from index.files import InputError

__all__ = ["merge", "search", "search_on_ranks"]

RunOnGroups = Callable[[Callable[[TopK], None], list[TopK]], object]

# Passages per block.
BLOCK_ROWS = {"cpu": 16384, "cuda": 65536}
# Products held at once, of a group of queries and a block (on a CPU, a slice): 8 MiB in float32, 1 GiB on a GPU.
PRODUCTS_AT_ONCE = {"cpu": 2**21, "cuda": 2**28}
# Results searched for at once; there are several candidates per result.
RESULTS_AT_ONCE = {"cpu": 2**20, "cuda": 2**62}
# Minimum number of queries per CPU thread.
MIN_QUERIES_PER_THREAD = 64
# Queries whose results are exchanged between ranks at once.
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
    """Find the k passages of highest inner product for each query, exactly.

    The score of a pair is the exact inner product of its float32 vectors, rounded to float64 and then to float32.
    Passages are sorted by score, descending, and passages of equal score by id, descending in UTF-8 bytes, as in
    trec_eval; this also decides ties at rank k. The result is the same, bit for bit, for any block size, sharding,
    device and precision: products in half precision (where that is faster) only select the pairs to score, with a bound
    on their error. Where too many pairs lie within the bound, float32 and then float64 products are used.

    Memory is constant: queries, results, two windows of vectors (256 MiB each, 1 GiB on a GPU), the products of a block
    (8 MiB per thread, 1 GiB on a GPU) and the candidates.

    Args:
        queries: [Q, D] float32.
        shards: (first row, vectors [n, D] of any floating dtype), in order and without gaps; read once. Tensors on the
            device are used in place.
        ids: unique ids of the N rows.
        k: results per query, at least 1.
        block_rows: passages multiplied at once; None: chosen for the device.
        device: where to search. Global precision settings of torch do not matter. Default "cpu".
        progress: called with the number of rows just searched.

    Returns:
        scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64, best first.

    Raises:
        InputError: a query or passage contains NaN or infinity, or products would overflow; the message names the row,
            and the id of a passage.
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
    """`search` by all ranks of a process group; every rank gets the same result as `search`, bit for bit.

    Rank r searches the shards r, r + W, r + 2W, …; then results are exchanged and merged. All ranks must pass the same
    arguments, except `device` and `progress`. Each rank sends 12 bytes per result to every other rank.

    Args:
        group: the process group; None: the default group.

    Raises:
        InputError: as `search`, on the rank where it occurs.
        ValueError: on every rank, if queries, dimensions, k or the number of passages differ between ranks.
        RuntimeError: another rank failed.
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
    _check_same_on_ranks(sizes, wire, group)
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
            _all_gather(_pad(scores[some], width, -np.inf), wire, group),
            _all_gather(_pad(rows[some], width, -1), wire, group),
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
    """`search` of rows that may have gaps."""
    # The scores are summed in float64, which Apple's GPUs do not have.
    torch_device = _with_index(torch.device("cpu" if torch.device(device).type == "mps" else device))
    block_rows = BLOCK_ROWS[torch_device.type] if block_rows is None else block_rows
    if k < 1 or block_rows < 1:
        raise ValueError(f"k, block_rows: expected numbers above 0, found {k}, {block_rows}")
    if queries.ndim != 2:
        raise ValueError(f"queries: expected shape [Q, D], found {queries.shape}")
    with full_precision(torch_device), _workers(torch_device, len(queries)) as (workers, run_on_groups):
        half = half_type(torch_device)
        vectors = torch.tensor(np.ascontiguousarray(queries, dtype=np.float32), device=torch_device)
        largest = _largest_magnitude(vectors)
        rows_at_once = min(block_rows, SLICE_ROWS.get(torch_device.type, block_rows), max(1, len(ids)))
        at_once = min(PRODUCTS_AT_ONCE[torch_device.type] // rows_at_once, RESULTS_AT_ONCE[torch_device.type] // k)
        at_once = max(1, min(at_once, -(-len(vectors) // workers)))
        parts = [TopK(Queries(part, half), k, ids) for part in vectors.split(at_once) if len(part)]
        window: Window | None = None
        # Closed on errors too, so that the prefetch thread stops.
        with contextlib.closing(pieces(shards, block_rows, len(ids), torch_device)) as stream:
            for piece in stream:
                if window is not None and window is not piece.window:
                    _rescore(parts, window, run_on_groups)
                window = piece.window
                block = Block.measured(piece.vectors, piece.first, piece.start, ids, half)
                # Half of the float32 maximum: products in half precision may slightly exceed the exact ones.
                if largest * block.largest * queries.shape[1] > torch.finfo(torch.float32).max / 2:
                    last = piece.first + piece.rows - 1
                    raise InputError(f"rows {piece.first} to {last}: inner products overflow float32")
                window.set_rows(piece.start, piece.first, piece.rows, block.norm)
                run_on_groups(partial(TopK.update, block=block, window=window), parts)
                if progress is not None:
                    progress(piece.rows)
        if window is not None:
            _rescore(parts, window, run_on_groups)
        tables = [to_arrays(part.query, part.score, part.row, part.count) for part in parts]
    if not tables:
        return np.empty((0, min(k, len(ids))), np.float32), np.empty((0, min(k, len(ids))), np.int64)
    return np.concatenate([scores for scores, _ in tables]), np.concatenate([rows for _, rows in tables])


def _rescore(parts: list[TopK], window: Window, run_on_groups: RunOnGroups) -> None:
    run_on_groups(partial(TopK.rescore, window=window), parts)
    window.release()


@contextlib.contextmanager
def _workers(torch_device: torch.device, queries: int) -> Iterator[tuple[int, RunOnGroups]]:
    """Yield the number of workers, and a function that runs a method on every group of queries.

    On a CPU, our own threads work on one group each. torch's intra-op threads would synchronize at every product, and
    candidate selection would run on a single one of them.
    """
    threads = torch.get_num_threads()
    if torch_device.type != "cpu" or threads == 1 or queries < threads * MIN_QUERIES_PER_THREAD:
        yield 1, _run_in_order
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            # Inference mode is per thread.
            yield threads, lambda work, parts: deque(pool.map(torch.inference_mode()(work), parts), maxlen=0)
        finally:
            torch.set_num_threads(threads)


def _run_in_order(work: Callable[[TopK], None], parts: list[TopK]) -> None:
    for part in parts:
        work(part)


def _checked(shards: Shards, queries: np.ndarray, rows: int) -> Iterator[tuple[int, Any]]:
    """Yield the shards; check that they are consecutive and have `rows` rows in total."""
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


def _largest_magnitude(queries: torch.Tensor) -> float:
    """Largest absolute value in `queries` [Q, D], which must be finite."""
    if not queries.numel():
        return 0.0
    smallest, largest = (float(value) for value in torch.aminmax(queries))
    magnitude = max(abs(smallest), abs(largest))
    if not np.isfinite(magnitude):
        row = int(queries.isfinite().all(dim=1).int().argmin())
        raise InputError(f"query {row}: expected a finite vector, found NaN or infinity")
    return magnitude


def _with_index(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`, as tensors report it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_same_on_ranks(sizes: dict[str, int], device: torch.device, group: distributed.ProcessGroup | None) -> None:
    """Check that all ranks were called with the same sizes."""
    found = list(_all_gather(torch.tensor(list(sizes.values())), device, group))
    for name, values in zip(sizes, np.stack(found, axis=1).tolist(), strict=True):
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(f"{name} differs between ranks: {values[0]} on rank 0, {values[other]} on rank {other}")


def _pad(table: np.ndarray, width: int, value: float) -> torch.Tensor:
    whole = np.full((len(table), width), value, table.dtype)
    whole[:, : table.shape[1]] = table
    return torch.from_numpy(whole)


def _all_gather(
    table: torch.Tensor, device: torch.device, group: distributed.ProcessGroup | None
) -> Iterable[np.ndarray]:
    table = table.to(device)
    tables = [torch.empty_like(table) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(tables, table, group=group)
    return [one.cpu().numpy() for one in tables]
