"""Statistics of the rows from what the tiles counted and the scores of the positive pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.distributed.communication import Communication
from losses.masked.pairs import PositivePairs, segment_logsumexp, segment_sum
from losses.torch_tiles.masks import RowStatistics


def finished_statistics(
    counted: RowStatistics,
    pairs: PositivePairs,
    scores: Tensor,
    negatives: Tensor,
    mean_exponent: Tensor,
    hardest_score: Tensor,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    communication: Communication,
) -> tuple[Tensor, ...]:
    """The fields of `losses.options.Statistics`, in order.

    Args:
        scores: [P] float64, S at the positive pairs.
        negatives: [M] float64, log N_i.
        mean_exponent: [M] float64, the mean of the negatives' exponents, each weighted by its term of N_i.
        hardest_score: [M] float64.
        sizes: Queries on all ranks, and passages of the pool.
    """
    size = len(negatives)
    positives = segment_logsumexp(scores, pairs.counted, pairs.rows, size)
    every = torch.logaddexp(positives, negatives)
    probability = (scores - every[pairs.rows]).exp() * pairs.counted
    mean = segment_sum(probability * scores, pairs.rows, size)
    # Without a negative their mean is NaN.
    mean = mean + torch.where(counted.counted > 0, (negatives - every).exp() * mean_exponent, 0)
    entropy = (every - mean).clamp(min=0)
    rank = counted.higher + 1
    number = segment_sum(pairs.counted, pairs.rows, size).to(torch.int64)
    masked = sizes[1] - number - counted.counted
    totals = torch.stack([(rank == 1).double().sum(), (1 / rank.double()).sum(), masked.double().sum()])
    communication.reduce_sum(totals)
    first_ranks, reciprocals, removed = totals
    queries, passages = sizes
    accuracy, mrr, masked_share = first_ranks / queries, reciprocals / queries, removed / (queries * passages)
    return (
        rank,
        counted.hardest,
        hardest_score.to(dtype),
        entropy.to(dtype),
        masked,
        accuracy.to(dtype),
        mrr.to(dtype),
        masked_share.to(dtype),
    )
