"""What removes entries from the tiles, and what is counted in them, when sums are over negatives alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RowStatistics:
    """Statistics of rows over the tiles so far, in place; exponents are in the units of the tiles.

    Attributes:
        higher: [M] int64, number of negatives that score higher than the positive.
        counted: [M] int64, number of negatives.
        hardest: [M] int64, row of the pool of the highest-scoring negative; −1 if there is none.
        hardest_exponent: [M], its exponent; minus infinity if there is none.
        weighted: [M], Σ_j exp(x_ij − shift_i) · (x_ij − shift_i) over the exponents x of the negatives.
    """

    higher: Tensor
    counted: Tensor
    hardest: Tensor
    hardest_exponent: Tensor
    weighted: Tensor

    @classmethod
    def empty(cls, queries: int, dtype: torch.dtype, device: torch.device) -> RowStatistics:
        """Statistics of no tile."""
        higher, counted = torch.zeros(2, queries, dtype=torch.int64, device=device)
        weighted = torch.zeros(queries, dtype=dtype, device=device)
        return cls(higher, counted, torch.full_like(higher, -1), torch.full_like(weighted, -torch.inf), weighted)


@dataclass(frozen=True)
class NegativeMasks:
    """Masks of the tiles beside ids and excluded pairs. The query's own positive is masked too.

    Attributes:
        product: [M], product of each query with its positive.
        limit: [M], a negative with a larger product is masked; or None.
        guide_query: [M, G] operand, or None.
        guide_limit: [M], a negative with a larger product of the guide is masked; or None.
        statistics: Filled in forward; or None.
    """

    product: Tensor
    limit: Tensor | None = None
    guide_query: Tensor | None = None
    guide_limit: Tensor | None = None
    statistics: RowStatistics | None = None


@dataclass(frozen=True)
class PairGradients:
    """M · dS at the positive pairs, which backward writes into its tiles.

    Attributes:
        rows: [P] int64 rows of queries, sorted.
        columns: [P] int64 rows of the pool.
        values: [P], equal for equal pairs.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
