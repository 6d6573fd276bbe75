"""The hardest negative of a batch and its query, as texts for the log (`loss.statistics: texts`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from losses import Guide, Statistics
from retriever.config.loss import LossConfig
from retriever.data.micro_batches import PreparedBatch

LONGEST = 300
"""Characters of a text in the log."""


@dataclass(frozen=True)
class HardestScores:
    """The scores of the query of a rank whose hardest negative scores highest, on the device."""

    query: Tensor
    """0-dim int64, its row."""
    products: Tensor
    """[N] its products with the passages of this rank."""
    guide_products: Tensor | None
    """[N] those of the guide's embeddings; None without a guide."""


@torch.no_grad()
def hardest_scores(
    statistics: Statistics, query: Tensor, passage: Tensor, guide: Guide | None, prefix: int | None = None
) -> HardestScores:
    """Score the passages of this rank for the query whose hardest negative scores highest. Does not wait.

    Args:
        statistics: Those of the loss.
        query: [M, D].
        passage: [N, D].
        guide: The guide of the step, or None.
        prefix: Columns of the embeddings that the statistics are about, divided by their norm. Default: None, the
            whole embeddings as they are.
    """
    if prefix is not None:
        query, passage = (normalize(side[:, :prefix], dim=1) for side in (query, passage))
    # Indexing with a tensor of no dimensions would wait for the device.
    row = statistics.hardest_score.argmax(0, keepdim=True)

    def products(queries: Tensor, passages: Tensor) -> Tensor:
        return (passages @ queries.index_select(0, row)[0]).float()

    guided = None if guide is None else products(guide.query, guide.passage)
    return HardestScores(row[0], products(query, passage), guided)


def hardest_negative(found: HardestScores, part: PreparedBatch, config: LossConfig) -> dict[str, Any] | None:
    """The texts of the hardest negative, of its query and positive, and of the hardest masked passage of the query.

    Waits for the device.

    Args:
        found: The scores of the first rank, whose passages are the first ones of the pool.
        part: The batch or its part, with texts.
        config: The configuration of the loss.

    Returns:
        The texts, shortened, and their products: "query", "positive", "positive_score", "negative", "negative_score"
        and, if a passage with another text than the positive is masked, "masked", "masked_score" and "masked_by".
        None if all passages of the rank are positives of the query.
    """
    assert part.texts is not None
    query, products = int(found.query), found.products.cpu().numpy()
    rules = _rules(found, part, config, query, products)
    texts = part.texts.passages
    order = [int(row) for row in np.argsort(-products, kind="stable")]
    left = next((row for row in order if rules[row] == ""), None)
    if left is None:
        return None
    removed = next((row for row in order if rules[row] not in ("", "positive") and texts[row] != texts[query]), None)

    def scored(name: str, row: int) -> dict[str, Any]:
        return {name: texts[row][:LONGEST], f"{name}_score": round(float(products[row]), 4)}

    masked = {} if removed is None else {**scored("masked", removed), "masked_by": rules[removed]}
    return {
        "query": part.texts.queries[query][:LONGEST],
        **scored("positive", query),
        **scored("negative", left),
        **masked,
    }


def describe_hardest(texts: dict[str, Any]) -> str:
    """A line for the terminal."""
    line = (
        f"hardest negative {texts['negative_score']:.3f} {texts['negative']!r:.90} of {texts['query']!r:.90} "
        f"(positive {texts['positive_score']:.3f} {texts['positive']!r:.60})"
    )
    if "masked" not in texts:
        return line
    return f"{line}; masked by {texts['masked_by']}: {texts['masked_score']:.3f} {texts['masked']!r:.90}"


def _rules(
    found: HardestScores, part: PreparedBatch, config: LossConfig, query: int, products: np.ndarray
) -> Sequence[str]:
    """Why each passage is not a negative of a query: "positive", the rule that masks it, or "" for a negative."""
    rules = np.full(len(products), "", dtype=object)
    if config.guide.given and found.guide_products is not None:
        guided = found.guide_products.cpu().numpy()
        rules[guided > guided[query] - config.guide.margin] = "guide"
    limit = np.inf
    if config.limit.margin is not None:
        limit = products[query] + config.limit.margin
    if config.limit.share is not None:
        limit = min(limit, products[query] - (1 - config.limit.share) * abs(products[query]))
    rules[products > limit] = "limit"
    masks = part.false_negatives
    if masks is not None and config.masks_false_negatives:
        rules[masks.passage_ids == masks.query_ids[query]] = "known positives"
        listed = masks.excluded[masks.excluded[:, 0] == query, 1]
        rules[listed[listed < len(rules)]] = "known positives"
    if part.positive_pairs is not None:
        further = part.positive_pairs[part.positive_pairs[:, 0] == query, 1]
        rules[further[further < len(rules)]] = "positive"
    rules[query] = "positive"
    return [str(rule) for rule in rules]
