"""Losses for the trainer of sentence-transformers: InfoNCE in memory linear in the batch (Inf-CL, arXiv 2410.17243).

`InfCLRankingLoss` takes the place of their `MultipleNegativesRankingLoss`, `CachedInfCLRankingLoss` that of their
`CachedMultipleNegativesRankingLoss`. Training needs the `train` extra of sentence-transformers (accelerate, datasets).
"""

from __future__ import annotations

from retriever.cached_ranking_loss import CachedInfCLRankingLoss
from retriever.ranking_loss import InfCLRankingLoss

__all__ = ["CachedInfCLRankingLoss", "InfCLRankingLoss"]
