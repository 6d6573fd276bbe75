"""Tiles of the score matrix: tile size for a workspace, masked scores, and the positives in a tile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from losses.inputs import ContrastiveBatch, accumulator_dtype
from losses.precision import BlockProducts, Precision

# On a CPU a larger tile does not speed up the products and no longer fits in the cache.
CPU_TILE_ENTRIES = 1 << 20


class ScoreTiles:
    """The masked score matrix of a batch, one tile at a time, all in the same buffer."""

    def __init__(self, batch: ContrastiveBatch, precision: Precision, workspace_bytes: int) -> None:
        self.batch = batch
        self.dtype = accumulator_dtype(batch.query.dtype)
        self.device = batch.query.device
        self.products = BlockProducts(precision, self.device)
        self.tile_rows, self.tile_columns = self._tile_shape(workspace_bytes)
        entries = self.tile_rows * self.tile_columns
        # Excluded pairs outside a tile are written to a spare entry at the end: selecting the pairs inside would
        # synchronize with the device.
        spare = int(batch.excluded is not None)
        self._scores = torch.empty(entries + spare, dtype=self.dtype, device=self.device)
        self._scratch = torch.empty_like(self._scores) if batch.symmetric else self._scores
        self._excluded = batch.excluded
        if self._excluded is not None and self.device.type == "cpu":
            # By query, so that a tile looks at the pairs of its rows alone: a search is free where nothing waits.
            self._excluded = self._excluded[self._excluded[:, 0].argsort()]
        self._masked = torch.empty(
            entries if batch.passage_ids is not None else 0, dtype=torch.bool, device=self.device
        )

    def _tile_shape(self, workspace_bytes: int) -> tuple[int, int]:
        """The largest tile, square if M and N allow, that fits the workspace with its temporaries."""
        batch, width = self.batch, torch.finfo(self.dtype).bits // 8
        per_entry = width * (1 + batch.symmetric) + 2 * self.products.native_bf16 + (batch.passage_ids is not None)
        # A block of embeddings is held up to three times: rounded, in the accumulator dtype, and its gradient.
        per_row = 3 * width * batch.query.shape[1]
        max_entries = CPU_TILE_ENTRIES if self.device.type == "cpu" else workspace_bytes // per_entry

        def other_side(count: int) -> int:
            """Rows of the other side that fit together with `count` rows of this side."""
            available = (workspace_bytes - per_row * count) // (per_entry * count + per_row)
            return max(1, min(available, max_entries // count))

        square = (math.sqrt(per_row**2 + per_entry * workspace_bytes) - per_row) / per_entry
        # With a group, a rank may have no rows.
        queries, passages = (max(1, len(side)) for side in (batch.query, batch.passage))
        rows = min(queries, max(1, min(int(square), math.isqrt(max_entries))))
        columns = min(passages, other_side(rows))
        return min(queries, other_side(columns)), columns

    def row_blocks(self) -> Iterator[slice]:
        return _blocks(self.batch.query.shape[0], self.tile_rows)

    def column_blocks(self) -> Iterator[slice]:
        return _blocks(self.batch.passage.shape[0], self.tile_columns)

    def query_block(self, rows: slice) -> Tensor:
        """[rows, D], in the operand dtype."""
        return self.products.operand(self.batch.query[rows])

    def passage_block(self, columns: slice) -> Tensor:
        """[columns, D], in the operand dtype."""
        return self.products.operand(self.batch.passage[columns])

    def scores(self, rows: slice, columns: slice, query: Tensor, passage: Tensor) -> Tensor:
        """S[rows, columns], minus infinity where masked. Valid until the next call."""
        self.products.scores(query, passage, self.buffer(rows, columns)).mul_(self.batch.logit_scale)
        return self.mask(rows, columns)

    def buffer(self, rows: slice, columns: slice) -> Tensor:
        """The buffer of `scores`, for a caller that computes scores in another way and masks them by `mask`."""
        return self._view(self._scores, rows, columns)

    def mask(self, rows: slice, columns: slice) -> Tensor:
        """Write minus infinity to the masked entries of the buffer, and return it."""
        tile = self.buffer(rows, columns)
        if self.batch.query_ids is not None and self.batch.passage_ids is not None:
            masked = self._view(self._masked, rows, columns)
            torch.eq(self.batch.query_ids[rows, None], self.batch.passage_ids[columns], out=masked)
            column, inside = self.positive_columns(rows, columns)
            masked.scatter_(1, column, masked.gather(1, column) & ~inside)
            tile.masked_fill_(masked, -torch.inf)
        if self._excluded is not None:
            self._exclude(self._excluded, rows, columns)
        return tile

    def _exclude(self, pairs: Tensor, rows: slice, columns: slice) -> None:
        if pairs.device.type == "cpu":
            first, end = torch.searchsorted(pairs[:, 0].contiguous(), torch.tensor([rows.start, rows.stop])).tolist()
            pairs = pairs[first:end]
        row, column = pairs[:, 0] - rows.start, pairs[:, 1] - columns.start
        height, width = rows.stop - rows.start, columns.stop - columns.start
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        entry = torch.where(inside, row * width + column, len(self._scores) - 1)
        self._scores.index_fill_(0, entry, -torch.inf)

    def scratch(self, rows: slice, columns: slice) -> Tensor:
        """A second buffer of the tile's shape; the tile's own buffer if the loss is not symmetric, which needs none."""
        return self._view(self._scratch, rows, columns)

    def positive_columns(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Columns of the positives relative to the tile, clamped to it, and whether they are inside it.

        Both are [rows, 1]. Selecting the rows inside would synchronize with the device.
        """
        column = self.batch.positive[rows, None] - columns.start
        last = columns.stop - columns.start - 1
        return column.clamp(0, last), (column >= 0) & (column <= last)

    def _view(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        shape = rows.stop - rows.start, columns.stop - columns.start
        return buffer[: shape[0] * shape[1]].view(shape)


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
