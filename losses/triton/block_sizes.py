"""Block sizes of the score matrix: blocks of dS that fit the workspace and fill the multiprocessors in whole waves."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

# Workspace beyond this keeps exponentials, if they can be kept.
MAX_BLOCK_BYTES = 256 * 2**20
# Tensor cores truncate when they accumulate: an inner dimension of this size gives an error of 8e-5 of a gradient,
# measured against blocks of 11,264.
MAX_BLOCK_SIDE = 2**16
# Output tile of half-precision products in cuBLAS.
CUBLAS_TILE_ROWS, CUBLAS_TILE_COLUMNS = 128, 256
# Inner dimension at which a cuBLAS product reaches half of its peak: the cost of starting a block.
HALF_SPEED_DEPTH = 800


@dataclass(frozen=True)
class Blocks:
    """dS is computed in blocks of at most `rows` × `columns`.

    Forward keeps the exponentials of rows below `kept_rows`. There dS overwrites them, in blocks of MAX_BLOCK_SIDE.
    """

    rows: int
    columns: int
    kept_rows: int


@functools.lru_cache(maxsize=256)
def choose_blocks(
    queries: int, passages: int, dim: int, itemsize: int, workspace_bytes: int, processors: int, keep: bool
) -> Blocks:
    """Block sizes of dS for [queries, passages] scores of `itemsize` bytes within `workspace_bytes`.

    The two products of a block have rows / 128 · dim / 256 and columns / 128 · dim / 256 output tiles. The shape with
    the least total time is chosen: waves of `processors` tiles, each costing its inner dimension plus a constant. With
    `keep`, memory beyond MAX_BLOCK_BYTES keeps exponentials, in whole rows of blocks; without it, blocks use all the
    memory.
    """
    block_bytes = min(workspace_bytes, MAX_BLOCK_BYTES) if keep else workspace_bytes
    entries = max(CUBLAS_TILE_ROWS**2, block_bytes // itemsize)
    column_tiles = math.ceil(dim / CUBLAS_TILE_COLUMNS)

    def waves(count: int, size: int) -> int:
        whole, rest = divmod(count, size)
        return whole * _waves(size, column_tiles, processors) + (_waves(rest, column_tiles, processors) if rest else 0)

    best: tuple[int, int, int] | None = None
    for rows in _candidate_sizes(queries, entries // CUBLAS_TILE_ROWS, column_tiles, processors):
        for columns in _candidate_sizes(passages, entries // rows, column_tiles, processors):
            if rows * columns > entries:
                continue
            down, across = math.ceil(queries / rows), math.ceil(passages / columns)
            cost = waves(queries, rows) * (passages + across * HALF_SPEED_DEPTH)
            cost += waves(passages, columns) * (queries + down * HALF_SPEED_DEPTH)
            best = (cost, rows, columns) if best is None else min(best, (cost, rows, columns))
    assert best is not None
    _, rows, columns = best
    kept_rows = 0
    if keep:
        spare = max(0, workspace_bytes - rows * columns * itemsize) // (round_up(passages, 8) * itemsize)
        kept_rows = queries if spare >= queries else spare // rows * rows
    return Blocks(rows, columns, kept_rows)


def gradient_blocks(queries: int, passages: int, blocks: Blocks) -> Iterator[tuple[slice, list[slice], bool]]:
    """(rows, list of columns, whether kept), in the order of backward."""
    for rows in spans(0, blocks.kept_rows, MAX_BLOCK_SIDE):
        yield rows, list(spans(0, passages, MAX_BLOCK_SIDE)), True
    for rows in spans(blocks.kept_rows, queries, blocks.rows):
        yield rows, list(spans(0, passages, blocks.columns)), False


def forward_blocks(
    queries: int,
    passages: int,
    kept_rows: int,
    workspace_bytes: int,
    block_m: int,
    block_n: int,
    further_bytes: float = 0.0,
) -> Iterator[tuple[slice, slice, bool]]:
    """(rows, columns, whether kept) of each forward launch, as large as what the tiles write fits the workspace.

    They write a sum and a maximum for each row and column of a tile, and `further_bytes` per entry of a tile.
    """
    per_entry = 8 * (1 / block_m + 1 / block_n) + further_bytes
    entries = max(CUBLAS_TILE_ROWS**2, int(min(workspace_bytes, MAX_BLOCK_BYTES) / per_entry))
    for start, stop, kept in ((0, kept_rows, True), (kept_rows, queries, False)):
        if start == stop:
            continue
        # Square blocks: in a long one, few programs would add long lists of sums.
        side = math.isqrt(entries)
        width = min(passages, max(side, entries // (stop - start)) // block_n * block_n or passages)
        height = min(stop - start, max(1, entries // width // block_m) * block_m)
        for rows in spans(start, stop, height):
            for columns in spans(0, passages, width):
                yield rows, columns, kept


def spans(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover start … stop − 1."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def _waves(count: int, column_tiles: int, processors: int) -> int:
    """Waves of `processors` output tiles for `count` rows."""
    return math.ceil(math.ceil(count / CUBLAS_TILE_ROWS) * column_tiles / processors)


def _candidate_sizes(count: int, max_size: int, column_tiles: int, processors: int) -> list[int]:
    """Sizes to try: the whole side, sizes that fill whole waves, and powers of two times a cuBLAS tile."""
    if count <= CUBLAS_TILE_ROWS:
        return [count]
    sizes = {CUBLAS_TILE_ROWS << power for power in range(12)}
    wave = processors * CUBLAS_TILE_ROWS // column_tiles // CUBLAS_TILE_ROWS * CUBLAS_TILE_ROWS
    sizes |= {wave * waves for waves in range(1, 9)}
    sizes |= {count}
    return sorted(size for size in sizes if 0 < size <= min(count, max(max_size, CUBLAS_TILE_ROWS), MAX_BLOCK_SIDE))
