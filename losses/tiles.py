"""Tiles of the score matrix: their size from a workspace, their masked scores, the places of the positives in them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from losses.batch import ContrastiveBatch, accumulator
from losses.precision import BlockProducts, Precision

# On a CPU a larger tile gains no speed in the products and leaves the cache before the passes over it.
CPU_TILE_ENTRIES = 1 << 20


class ScoreTiles:
    """The masked score matrix of a batch, one tile at a time, each in the same workspace."""

    def __init__(self, batch: ContrastiveBatch, precision: Precision, workspace_bytes: int) -> None:
        self.batch = batch
        self.dtype = accumulator(batch.query.dtype)
        self.device = batch.query.device
        self.products = BlockProducts(precision, self.device)
        self.tile_rows, self.tile_columns = self._tile_shape(workspace_bytes)
        entries = self.tile_rows * self.tile_columns
        # Excluded pairs outside a tile are written to the spare entry at the end: to select those inside would make a
        # GPU tell the host how many they are.
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
        """The largest tile, square where M and N allow, that fits the workspace with all that is made beside it."""
        batch, width = self.batch, torch.finfo(self.dtype).bits // 8
        per_entry = width * (1 + batch.symmetric) + 2 * self.products.native_bf16 + (batch.passage_ids is not None)
        # A block of embeddings stands there up to three times: rounded, widened, and its gradient.
        per_line = 3 * width * batch.query.shape[1]
        most_entries = CPU_TILE_ENTRIES if self.device.type == "cpu" else workspace_bytes // per_entry

        def beside(lines: int) -> int:
            """How many lines of the other side go with `lines` of this one."""
            room = (workspace_bytes - per_line * lines) // (per_entry * lines + per_line)
            return max(1, min(room, most_entries // lines))

        square = (math.sqrt(per_line**2 + per_entry * workspace_bytes) - per_line) / per_entry
        # Of several ranks one may hold no rows.
        queries, passages = (max(1, len(side)) for side in (batch.query, batch.passage))
        rows = min(queries, max(1, min(int(square), math.isqrt(most_entries))))
        columns = min(passages, beside(rows))
        return min(queries, beside(columns)), columns

    def row_blocks(self) -> Iterator[slice]:
        return _blocks(self.batch.query.shape[0], self.tile_rows)

    def column_blocks(self) -> Iterator[slice]:
        return _blocks(self.batch.passage.shape[0], self.tile_columns)

    def query_block(self, rows: slice) -> Tensor:
        """[rows, D], as the products read it."""
        return self.products.operand(self.batch.query[rows])

    def passage_block(self, columns: slice) -> Tensor:
        """[columns, D], as the products read it."""
        return self.products.operand(self.batch.passage[columns])

    def scores(self, rows: slice, columns: slice, query: Tensor, passage: Tensor) -> Tensor:
        """S[rows, columns], minus infinity where a passage is masked for a query. Valid until the next call."""
        tile = self._view(self._scores, rows, columns)
        self.products.scores(query, passage, tile).mul_(self.batch.logit_scale)
        if self.batch.query_ids is not None and self.batch.passage_ids is not None:
            masked = self._view(self._masked, rows, columns)
            torch.eq(self.batch.query_ids[rows, None], self.batch.passage_ids[columns], out=masked)
            place, inside = self.positive_places(rows, columns)
            masked.scatter_(1, place, masked.gather(1, place) & ~inside)
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
        """A second buffer of the tile's shape; the tile itself when the loss has one direction and needs none."""
        return self._view(self._scratch, rows, columns)

    def positive_places(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """For each row, its positive's column in the tile and whether it lies there (else a column to leave alone).

        Both [rows, 1]. Selecting the rows inside would make a GPU tell the host how many they are.
        """
        place = self.batch.positive[rows, None] - columns.start
        last = columns.stop - columns.start - 1
        return place.clamp(0, last), (place >= 0) & (place <= last)

    def _view(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        shape = rows.stop - rows.start, columns.stop - columns.start
        return buffer[: shape[0] * shape[1]].view(shape)


def _blocks(lines: int, size: int) -> Iterator[slice]:
    for start in range(0, lines, size):
        yield slice(start, min(start + size, lines))
