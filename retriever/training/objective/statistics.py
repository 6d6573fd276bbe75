"""Statistics of the scores of a batch, as numbers for the log of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch

from losses import Statistics
from retriever.config.loss import LossConfig
from retriever.data.micro_batches import PreparedBatch
from retriever.distributed.ranks import Ranks


def statistics_row(
    statistics: Statistics, logit_scale: float, batch: PreparedBatch, config: LossConfig, ranks: Ranks
) -> dict[str, float]:
    """Return the numbers of a logged step. Waits for the device; every rank must call it.

    Args:
        statistics: Those of the loss.
        logit_scale: The factor of the scores.
        batch: The batch, or the share of this rank.
        config: The configuration of the loss.
        ranks: The ranks.

    Returns:
        Means over the queries of all ranks, by name:

        - pool_accuracy@1 and pool_mrr: of the positive among the passages of the batch.
        - pool_rank: rank of the positive, from 1.
        - pool_hardest: cosine of the hardest negative; queries without a negative are left out.
        - pool_entropy: entropy in nats of the softmax over a row of scores.
        - pool_masked: share of all pairs of a query and a passage that are masked; pool_masked_known: because a row of
          the data pairs them, and pool_masked_scores: by loss.limit or loss.guide, where these are set.
    """
    has_negative = statistics.hardest >= 0
    hardest = torch.where(has_negative, statistics.hardest_score, 0).double().sum() / logit_scale
    sums = [statistics.rank.double().sum(), statistics.entropy.double().sum(), hardest, has_negative.double().sum()]
    # One copy from the device.
    scalars = [statistics.accuracy, statistics.mrr, statistics.masked_share]
    removed = statistics.masked.double().sum()
    values = torch.stack([*sums, removed, *(scalar.double() for scalar in scalars)]).tolist()
    masks = batch.false_negatives if config.masks_false_negatives else None
    known = 0 if masks is None else masks.count(batch.positive_pairs)
    totals = ranks.all_reduce_sum(len(statistics.rank), known, *values[:5])
    queries, known_masked, rank, entropy, hardest_sum, counted, all_masked = totals
    accuracy, mrr, masked = values[5:]
    by_rule = {}
    if known_masked:
        by_rule["pool_masked_known"] = masked * known_masked / all_masked
    if config.masks_by_score:
        by_rule["pool_masked_scores"] = masked * (all_masked - known_masked) / max(1.0, all_masked)
    return {
        "pool_accuracy@1": accuracy,
        "pool_mrr": mrr,
        "pool_rank": rank / queries,
        "pool_hardest": hardest_sum / max(1.0, counted),
        "pool_entropy": entropy / queries,
        "pool_masked": masked,
        **by_rule,
    }


def named_after_source(row: Mapping[str, float], name: str) -> dict[str, float]:
    """Return the values of a row that tell sources apart, under names that end in that of the batch's source."""
    return {
        f"{key}/{name}": value
        for key, value in row.items()
        if key in ("loss", "logit_scale") or key.startswith("pool_")
    }


def joined_statistics(parts: Sequence[tuple[Statistics, float]]) -> Statistics:
    """Join the statistics of the parts of a batch, each given with its share of all queries.

    `hardest` stays a row of its part. `masked_share` is the mean over parts, weighted by their queries.
    """
    if len(parts) == 1:
        return parts[0][0]
    joined = {}
    for field in fields(Statistics):
        values = [getattr(statistics, field.name) for statistics, _ in parts]
        if values[0].ndim:
            joined[field.name] = torch.cat(values)
        else:
            weighted = [value * share for value, (_, share) in zip(values, parts, strict=True)]
            joined[field.name] = torch.stack(weighted).sum()
    return Statistics(**joined)
