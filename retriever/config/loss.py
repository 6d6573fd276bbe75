"""Configuration of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from retriever.config.checks import check_at_least, is_positive
from retriever.config.loss_options import GuideConfig, LimitConfig, MatryoshkaConfig, TeacherConfig


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss."""

    name: Literal["inf_cl", "sigmoid", "clip"] = "inf_cl"
    """inf_cl: InfoNCE in tiles, with memory linear in the batch. sigmoid: SigLIP's pairwise loss, also with linear
    memory; its paper starts with logit_scale 10 and learns it. clip: symmetric InfoNCE on the full matrix, as in
    CLIP."""
    symmetric: bool = False
    """Add the loss from passages to queries: each positive passage is classified among all queries of the batch."""
    logit_scale: float = 20.0
    """Initial logit scale, 1 / temperature."""
    learn_logit_scale: bool = False
    """Learn the logarithm of the logit scale with the towers. False: the scale is constant."""
    max_logit_scale: float = 100.0
    """Maximum of the logit scale; larger values are clamped."""
    logit_bias: float = -10.0
    """Initial bias of the logits of the sigmoid loss. It is learned if learn_logit_scale is true."""
    implementation: Literal["auto", "full", "dense", "chunked", "triton"] = "auto"
    """How inf_cl and sigmoid are computed. full: the full matrix in PyTorch. dense: the full matrix in Triton kernels,
    only for inf_cl. chunked: tiles in PyTorch. triton: tiles in Triton kernels. auto: chosen by device and batch
    size."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Precision of the operands of the loss's matrix products; sums are in fp32. auto: the precision of the towers."""
    workspace_mib: int = 256
    """Memory of the loss for tiles and temporaries, in MiB, in addition to embeddings and their gradients."""
    exchange: Literal["auto", "ring", "gather"] = "auto"
    """How processes exchange passages for inf_cl. ring: block by block, with the least memory. gather: all at once.
    auto: gather with two processes or if the passages fit in workspace_mib, otherwise ring."""
    mask_duplicates: bool = True
    """Mask false negatives for inf_cl and sigmoid: a passage that any row of the sources pairs with a query's text is
    not a negative of that query. Texts that differ only in white space are equal. (If a batch has more than 4,194,304
    such pairs and more than 32 per query, all passages that are connected through shared queries are masked.)"""
    positives_reduction: Literal["mean", "sum"] = "mean"
    """How several positives of a query (data.positives all) are combined. mean: the mean of their losses, each without
    the other positives. sum: the loss of their summed probability."""
    limit: LimitConfig = field(default_factory=LimitConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    hardness: float = 0.0
    """Weight each negative by exp(hardness · c), where c is its product with the query (arXiv 2010.04592). 0: equal
    weights."""
    same_side: bool = False
    """Make the queries of the batch negatives of each other, and the passages, too, in a single sum (GTE, arXiv
    2308.03281, equation 6)."""
    matryoshka: MatryoshkaConfig = field(default_factory=MatryoshkaConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    statistics: Literal["auto", "none", "numbers", "texts"] = "auto"
    """Statistics of the scores of the batch, on steps that are logged: accuracy@1 and MRR of the positive in the pool,
    its mean rank, the score of the hardest negative, entropy, and the share of pairs that each rule masks. none: no
    statistics. numbers: all of them. texts: also the hardest negative of the batch (of the first process) and its
    query as texts, and the hardest masked passage of that query with the rule that masks it. auto: numbers, if
    the loss has statistics: inf_cl, except with query_only."""

    def __post_init__(self) -> None:
        if not is_positive(self.max_logit_scale):
            raise ValueError(f"loss.max_logit_scale: expected a positive number, found {self.max_logit_scale}")
        if not 0 < self.logit_scale <= self.max_logit_scale:
            raise ValueError(
                f"loss.logit_scale: expected a number over 0 and at most max_logit_scale "
                f"({self.max_logit_scale}), found {self.logit_scale}"
            )
        if not math.isfinite(self.logit_bias):
            raise ValueError(f"loss.logit_bias: expected a number, found {self.logit_bias}")
        if self.name == "sigmoid" and self.implementation == "dense":
            raise ValueError("loss.implementation: expected auto, full, chunked or triton for the sigmoid loss")
        check_at_least(self, "loss.", 1, "workspace_mib")
        if not 0 <= self.hardness < math.inf:
            raise ValueError(f"loss.hardness: expected a number of at least 0, found {self.hardness}")

    @property
    def masks_by_score(self) -> bool:
        """Whether negatives are masked because of their scores."""
        return self.limit.given or self.guide.given

    @property
    def masks_false_negatives(self) -> bool:
        """Whether false negatives are masked. The clip loss masks none, as in the literature."""
        return self.mask_duplicates and self.name != "clip"
