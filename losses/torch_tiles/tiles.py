"""Tiles of the score matrix: tile size for a workspace, masked scores, and the positives in a tile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.checks import accumulator_dtype
from losses.inputs import ContrastiveBatch
from losses.precision import BlockProducts, Precision
from losses.torch_tiles.masks import NegativeMasks, PairGradients

# On a CPU a larger tile does not speed up the products and no longer fits in the cache.
CPU_TILE_ENTRIES = 1 << 20


@dataclass(frozen=True)
class TileMasks:
    """Masks of the tiles of one block of passages; with them, positives are masked too.

    Attributes:
        masks: Thresholds of the rows.
        guide: [n, G] embeddings of the guide for the block's passages, or None.
        first: Row of the pool at which the block begins.
        pairs: Derivatives at the positive pairs, in backward; or None.
    """

    masks: NegativeMasks
    guide: Tensor | None
    first: int
    pairs: PairGradients | None


class ScoreTiles:
    """The masked score matrix of a batch, one tile at a time, all in the same buffer."""

    def __init__(
        self, batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, masks: TileMasks | None = None
    ) -> None:
        self.batch, self.masks = batch, masks
        self.dtype = accumulator_dtype(batch.query.dtype)
        self.device = batch.query.device
        self.products = BlockProducts(precision, self.device)
        self.tile_rows, self.tile_columns = self._tile_shape(workspace_bytes)
        entries = self.tile_rows * self.tile_columns
        # Excluded pairs outside a tile are written to a spare entry at the end: selecting the pairs inside would
        # synchronize with the device.
        spare = int(batch.excluded is not None or masks is not None)
        self._scores = torch.empty(entries + spare, dtype=self.dtype, device=self.device)
        self._scratch = torch.empty_like(self._scores) if self._needs_scratch() else self._scores
        self._excluded = batch.excluded
        if self._excluded is not None and self.device.type == "cpu":
            # By query, so that a tile looks at the pairs of its rows alone: a search is free where nothing waits.
            self._excluded = self._excluded[self._excluded[:, 0].argsort()]
        self._masked = torch.empty(entries if self._needs_mask() else 0, dtype=torch.bool, device=self.device)

    def _needs_scratch(self) -> bool:
        return self.batch.symmetric or (self.masks is not None and self.masks.guide is not None)

    def _needs_mask(self) -> bool:
        thresholds = self.masks is not None and (self.masks.masks.limit, self.masks.guide) != (None, None)
        return self.batch.passage_ids is not None or thresholds

    def _tile_shape(self, workspace_bytes: int) -> tuple[int, int]:
        """The largest tile, square if M and N allow, that fits the workspace with its temporaries."""
        batch, width = self.batch, torch.finfo(self.dtype).bits // 8
        per_entry = width * (1 + self._needs_scratch()) + 2 * self.products.native_bf16 + self._needs_mask()
        # A block of embeddings is held up to three times: rounded, in the accumulator dtype, and its gradient.
        per_row = 3 * width * batch.query.shape[1]
        if self.masks is not None:
            # Statistics hold exponents, exponentials and comparisons of a tile.
            per_entry += (2 * width + 2) * (self.masks.masks.statistics is not None)
            per_row += 0 if self.masks.guide is None else 2 * width * self.masks.guide.shape[1]
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
        """S[rows, columns], minus infinity where masked. Valid until the next call, which overwrites `scratch` too."""
        tile = self.buffer(rows, columns)
        self.products.scores(query, passage, tile)
        limit = self.masks.masks.limit if self.masks is not None else None
        if limit is None:
            tile.mul_(self.batch.logit_scale)
        else:
            masked = torch.gt(tile, limit[rows, None], out=self._view(self._masked, rows, columns))
            tile.mul_(self.batch.logit_scale).masked_fill_(masked, -torch.inf)
        return self.mask(rows, columns)

    def buffer(self, rows: slice, columns: slice) -> Tensor:
        """The buffer of `scores`, for a caller that computes scores in another way and masks them by `mask`."""
        return self._view(self._scores, rows, columns)

    def mask(self, rows: slice, columns: slice) -> Tensor:
        """Write minus infinity to the masked entries of the buffer, and return it."""
        tile = self.buffer(rows, columns)
        if self.masks is not None:
            self._mask_negatives(tile, self.masks, rows, columns)
        if self.batch.query_ids is not None and self.batch.passage_ids is not None:
            masked = self._view(self._masked, rows, columns)
            torch.eq(self.batch.query_ids[rows, None], self.batch.passage_ids[columns], out=masked)
            column, inside = self.positive_columns(rows, columns)
            masked.scatter_(1, column, masked.gather(1, column) & ~inside)
            tile.masked_fill_(masked, -torch.inf)
        if self._excluded is not None:
            self._exclude(self._excluded, rows, columns)
        return tile

    def _mask_negatives(self, tile: Tensor, masks: TileMasks, rows: slice, columns: slice) -> None:
        """Minus infinity at the positives, and where the guide's products exceed their limits."""
        guide_query, guide_limit = masks.masks.guide_query, masks.masks.guide_limit
        if masks.guide is not None and guide_query is not None and guide_limit is not None:
            query, passage = (self.products.operand(side) for side in (guide_query[rows], masks.guide[columns]))
            guided = self.products.scores(query, passage, self._view(self._scratch, rows, columns))
            masked = torch.gt(guided, guide_limit[rows, None], out=self._view(self._masked, rows, columns))
            tile.masked_fill_(masked, -torch.inf)
        column, inside = self.positive_columns(rows, columns)
        tile.scatter_(1, column, torch.where(inside, -torch.inf, tile.gather(1, column)))

    def _exclude(self, pairs: Tensor, rows: slice, columns: slice) -> None:
        span = _pairs_of(pairs[:, 0], rows)
        entry = self._entries(pairs[span, 0], pairs[span, 1], rows, columns)
        self._scores.index_fill_(0, entry, -torch.inf)

    def write_pair_gradients(self, rows: slice, columns: slice) -> None:
        """Write the derivatives at the positive pairs into the current tile."""
        pairs = self.masks.pairs if self.masks is not None else None
        if self.masks is None or pairs is None:
            return
        span = _pairs_of(pairs.rows, rows)
        entry = self._entries(pairs.rows[span], pairs.columns[span] - self.masks.first, rows, columns)
        self._scores[entry] = pairs.values[span]

    def _entries(self, pair_rows: Tensor, pair_columns: Tensor, rows: slice, columns: slice) -> Tensor:
        """Places of pairs in the buffer of the tile; the spare one for pairs outside the tile."""
        row, column = pair_rows - rows.start, pair_columns - columns.start
        height, width = rows.stop - rows.start, columns.stop - columns.start
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return torch.where(inside, row * width + column, len(self._scores) - 1)

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


def _pairs_of(pair_rows: Tensor, rows: slice) -> slice:
    """The pairs with these rows, if they are sorted by row on a CPU; otherwise all pairs."""
    if pair_rows.device.type != "cpu":
        return slice(0, len(pair_rows))
    first, end = torch.searchsorted(pair_rows.contiguous(), torch.tensor([rows.start, rows.stop])).tolist()
    return slice(first, end)


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
