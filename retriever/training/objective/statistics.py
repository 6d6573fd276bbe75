"""Statistics of the scores of a batch, as numbers for the log of a run."""

from __future__ import annotations

import torch

from losses import Statistics
from retriever.distributed.ranks import Ranks


def statistics_row(statistics: Statistics, logit_scale: float, ranks: Ranks) -> dict[str, float]:
    """Return the numbers of a logged step. Waits for the device; every rank must call it.

    Returns:
        Means over the queries of all ranks, by name:

        - pool_accuracy@1 and pool_mrr: of the positive among the passages of the batch.
        - pool_rank: rank of the positive, from 1.
        - pool_hardest: cosine of the hardest negative; queries without a negative are left out.
        - pool_entropy: entropy in nats of the softmax over a row of scores.
        - pool_masked: share of all pairs of a query and a passage that are masked.
    """
    has_negative = statistics.hardest >= 0
    hardest = torch.where(has_negative, statistics.hardest_score, 0).double().sum() / logit_scale
    sums = [statistics.rank.double().sum(), statistics.entropy.double().sum(), hardest, has_negative.double().sum()]
    # One copy from the device.
    scalars = [statistics.accuracy, statistics.mrr, statistics.masked_share]
    values = torch.stack([*sums, *(scalar.double() for scalar in scalars)]).tolist()
    queries, rank, entropy, hardest_sum, counted = ranks.all_reduce_sum(len(statistics.rank), *values[:4])
    accuracy, mrr, masked = values[4:]
    return {
        "pool_accuracy@1": accuracy,
        "pool_mrr": mrr,
        "pool_rank": rank / queries,
        "pool_hardest": hardest_sum / max(1.0, counted),
        "pool_entropy": entropy / queries,
        "pool_masked": masked,
    }
