"""Options of the losses that take more than one value, as small frozen dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from losses.checks import check_choice, check_number

Reduction = Literal["mean", "sum"]
TeacherKind = Literal["kl", "margin_mse"]


@dataclass(frozen=True)
class Positives:
    """Further positives of queries, beside the one in `positive`.

    Let P_i be all positives of query i, p(i) included. With "mean", the row loss is the mean over p ∈ P_i of
    log(exp S_ip + Σ_{j ∉ P_i} exp S_ij) − S_ip. With "sum", it is log Σ_j exp S_ij − log Σ_{p ∈ P_i} exp S_ip, as in
    supervised contrastive learning (Khosla et al., arXiv 2004.11362).

    The column direction is the same for each positive passage j with its queries R_j = {i : j ∈ P_i}: with "mean" the
    mean over i ∈ R_j of log(exp S_ij + Σ_{i' ∉ R_j} exp S_i'j) − S_ij, with "sum" log Σ_i exp S_ij −
    log Σ_{i ∈ R_j} exp S_ij. The column part of a symmetric loss is the mean over the passages that are a positive of
    any query. There, queries that share a passage are not negatives of each other; without `positives` they are.

    Attributes:
        pairs: [P, 2] integers, pairs (query row, passage row). Repeated pairs, and a query with its own `positive`,
            count once. With a group, rows of this rank's queries and rows of the pool. Costs about 200 bytes per pair.
        reduction: How the positives of a query are combined. Default: "mean".

    Raises:
        ValueError: If `reduction` is neither.
    """

    pairs: Tensor
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_choice("positives.reduction", self.reduction, Reduction)


@dataclass(frozen=True)
class NegativeLimit:
    """Removes negatives that score higher than the query's positive allows, because they are probably false negatives.

    Let c_ij = q_i · k_j, without logit_scale. Negative (i, j) is removed if c_ij > c_i,p(i) + margin, or if
    c_ij > c_i,p(i) − (1 − share) · |c_i,p(i)| (NV-Retriever, arXiv 2407.15831, uses share 0.95). No gradient flows
    through the threshold. p(i) is the query's `positive`, not one of `positives`.

    Attributes:
        margin: Distance that is added to the positive's c; may be negative. Default: None, no limit by margin.
        share: Share of the positive's score that a negative may reach, greater than 0. Default: None, no limit by
            share.

    Raises:
        ValueError: If neither is given, or one is not a finite number.
    """

    margin: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.margin is None and self.share is None:
            raise ValueError("negatives.limit needs a margin or a share")
        if self.margin is not None:
            check_number("negatives.limit.margin", self.margin)
        if self.share is not None:
            check_number("negatives.limit.share", self.share)
            if not self.share > 0:
                raise ValueError(f"negatives.limit.share must be positive, found {self.share}")


@dataclass(frozen=True)
class Guide:
    """Removes negatives that another model scores near its score of the positive (GISTEmbed, arXiv 2402.16829).

    Negative (i, j) is removed if g_ij > g_i,p(i) − margin, where g_ij is the product of the guide's embeddings. It is
    computed in the dtype of `query` and in the precision of the loss, a second product for each tile.

    Attributes:
        query: [M, G] floating point, the guide's embeddings of the queries; they get no gradient.
        passage: [N, G], the guide's embeddings of the passages; with a group, of this rank's passages.
        margin: Distance that is subtracted from the positive's g. Default: 0.

    Raises:
        ValueError: If `margin` is not a finite number.
    """

    query: Tensor
    passage: Tensor
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_number("negatives.guide.margin", self.margin)


@dataclass(frozen=True)
class Ragged:
    """A different number of rows for each query.

    Attributes:
        values: [H, D] the rows of query 0, then of query 1, and so on.
        offsets: [M + 1] int64, the rows of query i are values[offsets[i] : offsets[i + 1]].
    """

    values: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Negatives:
    """What counts as a negative of a query: which passages of the batch, with what weight, and what else.

    Attributes:
        limit: Removes negatives by their score relative to the positive's. Default: None.
        guide: Removes negatives by the scores of another model. Default: None.
        own: Hard negatives that only their own query has. Default: None.
        frozen: [F, D] passages that are negatives of every query and get no gradient, on the device or on the host,
            from where they are streamed in blocks; or the reader of an embedding store. Default: None.
        frozen_excluded: [R, 2] int64 pairs (query row, frozen row) that are not negatives. Default: None.
        same_side: Whether queries are negatives of queries and passages of passages, in a single partition function
            (GTE, arXiv 2308.03281, equation 6). Default: False.
        hardness: β ≥ 0 of the weights w_ij = exp(β · c_ij) with c_ij = q_i · k_j, which get no gradient (Robinson
            et al., arXiv 2010.04592): in row and column sums, negative (i, j) counts as w_ij · exp S_ij, and a
            positive as exp S_ip; `own` and `frozen` negatives are weighted, too. The weights are not divided by their
            mean over the negatives, as the paper's estimator does. Default: 0, equal weights.

    `limit` and `guide` apply to the passages of the batch, not to `own` and `frozen`. `same_side` does not combine with
    `limit`, `guide` and `hardness`.

    Raises:
        ValueError: If `hardness` is not a finite number of at least 0, or an option has the wrong type.
    """

    limit: NegativeLimit | None = None
    guide: Guide | None = None
    own: Ragged | None = None
    frozen: Any = None
    frozen_excluded: Tensor | None = None
    same_side: bool = False
    hardness: float = 0.0

    def __post_init__(self) -> None:
        check_number("negatives.hardness", self.hardness)
        if self.hardness < 0:
            raise ValueError(f"negatives.hardness must not be negative, found {self.hardness}")
        for name, value, kind in (("limit", self.limit, NegativeLimit), ("guide", self.guide, Guide)):
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"negatives.{name} must be a {kind.__name__}, found {type(value).__name__}")


@dataclass(frozen=True)
class Matryoshka:
    """The weighted sum of the loss over prefixes of the embeddings (Kusupati et al., arXiv 2205.13147).

    The loss of size d is that of the first d columns of both sides, each row divided by its norm. A row that is zero
    there has scores 0 and gets no gradient from this size. Columns beyond the last size are not used.

    Every other option applies to each prefix as it would to embeddings of that size: c_ij of `limit` and `hardness` are
    the prefix's, `own` and `frozen` negatives are cut and divided by their norm, too, and a teacher is added once for
    each prefix. `Statistics` are those of the longest prefix. With `excluded` and ids alone, one product gives the
    scores of all prefixes; with another option, each prefix has a loss of its own.

    Attributes:
        dims: Sizes of the prefixes, increasing; the last may be D.
        weights: Weight of each prefix. Default: None, 1 each.
    """

    dims: Sequence[int]
    weights: Sequence[float] | None = None


@dataclass(frozen=True)
class Teacher:
    """Distillation from a teacher's embeddings over the whole pool.

    Adds weight · mean over queries of KL(softmax_j(scale · t_i · t_j) ‖ softmax_j(S_ij)). Entries that are removed from
    S are removed from both distributions. With `symmetric`, the columns of S still have the contrastive loss alone.

    Attributes:
        query: [M, T] the teacher's embeddings of the queries; they get no gradient.
        passage: [N, T] the teacher's embeddings of the passages.
        scale: 1 / temperature of the teacher's scores.
        weight: Factor of the divergence. Default: 1.
    """

    query: Tensor
    passage: Tensor
    scale: float
    weight: float = 1.0


@dataclass(frozen=True)
class TeacherScores:
    """Distillation from given scores of a list of passages for each query, for example those of a cross-encoder.

    Let L_i be the list of query i, t_ij the given scores, and S_ij = logit_scale · q_i · k_j. Adds weight times the
    mean over all queries of

    - "kl": KL(softmax_{j ∈ L_i}(scale · t_ij) ‖ softmax_{j ∈ L_i}(S_ij)), or
    - "margin_mse": the mean over j ∈ L_i except its first passage p of (S_ip − S_ij − scale · (t_ip − t_ij))²
      (Hofstätter et al., arXiv 2010.02666); p is usually the positive.

    A query whose list is too short adds zero. Lists are independent of the masks of the contrastive loss.

    Attributes:
        passages: [P] int64 rows of the pool: the list of query 0, then of query 1, and so on.
        offsets: [M + 1] int64, the list of query i is passages[offsets[i] : offsets[i + 1]].
        scores: [P] the given scores; they get no gradient.
        kind: "kl" or "margin_mse". Default: "kl".
        scale: Factor of the given scores. Default: 1.
        weight: Factor of the added term. Default: 1.
    """

    passages: Tensor
    offsets: Tensor
    scores: Tensor
    kind: TeacherKind = "kl"
    scale: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class Statistics:
    """What `statistics=True` returns beside the loss; nothing here has a gradient.

    With a group, the vectors are those of this rank's queries, and the scalars are the same on every rank. float64
    embeddings give float64 numbers. Negatives outside the batch (`negatives.own`, `negatives.frozen`) and
    within a side (`negatives.same_side`) are not part of S and not counted. With `matryoshka`, S is that of the longest
    prefix.

    Attributes:
        rank: [M] int64, one plus the number of negatives that score higher than the query's `positive`. Entries that
            are removed from S, and further positives, are not negatives.
        hardest: [M] int64, the row of the highest-scoring negative in the pool, the first of equal ones; −1 if a query
            has none.
        hardest_score: [M] float32, its S_ij; −inf if a query has none.
        entropy: [M] float32, entropy in nats of the softmax over the query's row of S, as the loss uses it: without
            removed entries, with all positives and, with `hardness`, with weighted negatives.
        masked: [M] int64, number of the row's entries that are removed from S by ids, `excluded`, `limit` or `guide`.
        accuracy: 0-dim float32, share of the queries of all ranks whose positive has rank 1.
        mrr: 0-dim float32, mean of 1 / rank over the queries of all ranks.
        masked_share: 0-dim float32, share of all entries of S that are removed.
    """

    rank: Tensor
    hardest: Tensor
    hardest_score: Tensor
    entropy: Tensor
    masked: Tensor
    accuracy: Tensor
    mrr: Tensor
    masked_share: Tensor
