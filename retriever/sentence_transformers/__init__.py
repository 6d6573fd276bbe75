"""Losses for `SentenceTransformerTrainer`: InfoNCE with memory linear in the batch (Inf-CL, arXiv 2410.17243).

`InfCLRankingLoss` replaces `MultipleNegativesRankingLoss`, and `CachedInfCLRankingLoss` replaces
`CachedMultipleNegativesRankingLoss`. Training requires the `train` extra of sentence-transformers (accelerate,
datasets).
"""

from __future__ import annotations

import sentence_transformers

# The gradient cache of older versions averages over ranks after every mini-batch. Ranks with fewer of them would hang.
if tuple(int(part) for part in sentence_transformers.__version__.split(".")[:2]) < (6, 2):
    raise ImportError(
        f"retriever.sentence_transformers needs sentence-transformers 6.2 or newer, found "
        f"{sentence_transformers.__version__}: pip install -U sentence-transformers"
    )

from retriever.sentence_transformers.cached_ranking_loss import CachedInfCLRankingLoss
from retriever.sentence_transformers.ranking_loss import InfCLRankingLoss

__all__ = ["CachedInfCLRankingLoss", "InfCLRankingLoss"]
