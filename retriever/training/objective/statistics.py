"""Statistics of the scores of a batch, as numbers for the log of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses import Statistics
from retriever.config.loss import LossConfig
from retriever.data.micro_batches import PreparedBatch
from retriever.distributed.ranks import Ranks
from retriever.training.objective.hardest import HardestScores
from retriever.training.objective.options import LossOptions


@dataclass(frozen=True)
class PartStatistics:
    """Statistics of a part of a batch, or of a batch without parts, on the device."""

    part: PreparedBatch
    of_loss: Statistics
    without_guide: Tensor | None = None
    """[M] int64, number of masked entries if there were no guide; None unless both a limit and a guide mask."""
    hardest: HardestScores | None = None
    """What the texts of the hardest negative are found with; None if they are not wanted."""


def masked_without_guide(
    loss: Callable[..., Any], query: Tensor, passage: Tensor, options: LossOptions
) -> Tensor | None:
    """Count the entries that are masked without the guide, in a further forward of the loss.

    Args:
        loss: The loss. Every rank must call this.
        query: [M, D].
        passage: [N, D].
        options: The options of the step.

    Returns:
        [M] int64; None unless both a limit and a guide mask, since the rules are told apart without it otherwise.
    """
    negatives = options.negatives
    if negatives is None or negatives.limit is None or negatives.guide is None:
        return None
    negatives = dataclasses.replace(negatives, guide=None, own=None)
    options = dataclasses.replace(options, negatives=negatives, teacher=None, statistics=True)
    with torch.no_grad():
        _, found = loss(query.detach(), passage.detach(), **options.arguments())
    masked: Tensor = found.masked
    return masked


def statistics_row(found: PartStatistics, logit_scale: Tensor, config: LossConfig, ranks: Ranks) -> dict[str, float]:
    """Return the numbers of a logged step. Waits for the device; every rank must call it.

    Args:
        found: The statistics.
        logit_scale: 0-dim, the factor of the scores.
        config: The configuration of the loss.
        ranks: The ranks.

    Returns:
        Means over the queries of all ranks, by name:

        - pool_accuracy@1 and pool_mrr: of the positive among the passages of the batch.
        - pool_rank: rank of the positive, from 1.
        - pool_hardest: cosine of the hardest negative; queries without a negative are left out.
        - pool_entropy: entropy in nats of the softmax over a row of scores.
        - pool_masked: share of all pairs of a query and a passage that are masked.
        - pool_masked_duplicates: of those, pairs with a passage that answers the same queries as the query's positive,
          mostly because it is a copy of it; pool_masked_known: other pairs that a row of the data has.
        - pool_masked_limit and pool_masked_guide: further pairs that loss.limit removes, and pairs that only loss.guide
          removes, where these are set. The four add up to pool_masked.
    """
    statistics = found.of_loss
    has_negative = statistics.hardest >= 0
    hardest = torch.where(has_negative, statistics.hardest_score, 0).double().sum() / logit_scale.detach()
    removed = statistics.masked.double().sum()
    unguided = removed if found.without_guide is None else found.without_guide.double().sum()
    sums = [statistics.rank.double().sum(), statistics.entropy.double().sum(), hardest, has_negative.double().sum()]
    # One copy from the device.
    scalars = [statistics.accuracy, statistics.mrr, statistics.masked_share]
    values = torch.stack([*sums, removed, unguided, *(scalar.double() for scalar in scalars)]).tolist()
    masks = found.part.false_negatives if config.masks_false_negatives else None
    listed = 0 if masks is None else len(masks.excluded)
    duplicates = 0 if masks is None else masks.count(found.part.positive_pairs) - listed
    totals = ranks.all_reduce_sum(len(statistics.rank), duplicates, listed, *values[:6])
    queries, duplicates_, listed_, rank, entropy, hardest_sum, counted, all_removed, all_unguided = totals
    accuracy, mrr, masked = values[6:]
    by_rule = {"duplicates": duplicates_, "known": listed_} if config.masks_false_negatives else {}
    by_score = all_removed - duplicates_ - listed_
    if config.limit.given:
        by_rule["limit"] = by_score - (all_removed - all_unguided)
    if config.guide.given:
        by_rule["guide"] = all_removed - all_unguided if config.limit.given else by_score
    return {
        "pool_accuracy@1": accuracy,
        "pool_mrr": mrr,
        "pool_rank": rank / queries,
        "pool_hardest": hardest_sum / max(1.0, counted),
        "pool_entropy": entropy / queries,
        "pool_masked": masked,
        **{f"pool_masked_{rule}": masked * count / max(1.0, all_removed) for rule, count in by_rule.items()},
    }


def mean_row(rows: Sequence[Mapping[str, float]], shares: Sequence[float]) -> dict[str, float]:
    """The means of the rows of the parts of a batch, weighted by their shares of its queries.

    A value that some rows lack, because the source has no such rule, counts as zero in them.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row.get(name, 0.0) * share for row, share in zip(rows, shares, strict=True)) for name in names}


def named_after_source(row: Mapping[str, float], name: str) -> dict[str, float]:
    """Return the values of a row that tell sources apart, under names that end in that of the batch's source."""
    return {
        f"{key}/{name}": value
        for key, value in row.items()
        if key in ("loss", "logit_scale") or key.startswith("pool_")
    }
