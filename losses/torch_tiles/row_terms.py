"""Merging further terms into the row sums of the pool.

A further term of row i is a log-sum-exp e_i of scores outside the pool. With R_i, the log-sum-exp of the row in the
pool, the denominator of the row becomes L_i = log(exp R_i + Σ exp e_i). In a single partition function, C_i, the
log-sum-exp of the column of query i's positive, is a term too. Each term's share of the denominator is all that
backward needs: the gradient of L_i is the sum of the terms' gradients, weighted by their shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """Shares of the denominator exp L_i of each row; they sum to 1.

    Attributes:
        log_row: [M], R_i − L_i, so that the row loss L_i − S_i,p(i) is that of the pool minus this.
        row: [M], share of the pool's row.
        column: [M], share of the column of the positive in a single partition function, otherwise None.
        further: [k, M], shares of the further terms.
    """

    log_row: Tensor
    row: Tensor
    column: Tensor | None
    further: Tensor

    @classmethod
    def of(cls, row: Tensor, column: Tensor | None, further: Tensor) -> Shares:
        """Shares of the log-sum-exps `row` [M], `column` [M] (single partition function only) and `further` [k, M]."""
        columns = [] if column is None else [column[None]]
        log_shares = torch.cat([row[None], *columns, further]).log_softmax(0)
        shares = log_shares.exp()
        first = 1 + len(columns)
        return cls(log_shares[0], shares[0], None if column is None else shares[1], shares[first:])

    def row_factor(self, symmetric: bool) -> Tensor:
        """[M], factor of the weights of rows.

        A symmetric loss halves the weights; a single partition function counts both directions fully.
        """
        return 2 * self.row if symmetric and self.column is not None else self.row

    def further_gradient(self, symmetric: bool) -> Tensor:
        """[k, M], gradients of the further terms, times the number of queries, for an upstream gradient of 1."""
        return self.further / 2 if symmetric and self.column is None else self.further


def column_counts(positive: Tensor, share: Tensor, passages: int) -> Tensor:
    """[N]: twice the sum of the column shares of the queries whose positive each passage is.

    It takes the place of the number of those queries, whose weight is halved. `positive` outside 0, …, N − 1 are
    positives elsewhere.
    """
    counts = share.new_zeros(passages)
    if not passages:
        return counts
    inside = (positive >= 0) & (positive < passages)
    # Unlike index_add_, this is deterministic on a GPU.
    return counts.index_put_((positive.clamp(0, passages - 1),), torch.where(inside, 2 * share, 0), accumulate=True)
