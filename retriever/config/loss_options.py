"""Configuration of the options of the loss that take more than one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import AvoidSubcommands

from retriever.config.checks import is_positive


@dataclass(frozen=True)
class LimitConfig:
    """Removes negatives that score higher than their query's positive allows, as probable false negatives.

    c is the inner product of two embeddings, without logit_scale. No gradient flows through the limit.
    """

    margin: float | None = None
    """Remove negatives whose inner product c with the query is above c of the positive + margin; may be negative. None:
    no limit by margin."""
    share: float | None = None
    """Remove negatives whose inner product c with the query is above this share of that of the positive, c⁺, such as
    0.95 (NV-Retriever, arXiv 2407.15831): c > c⁺ - (1 - share) · abs(c⁺). None: no limit by share."""

    @property
    def given(self) -> bool:
        """Whether there is a limit."""
        return self.margin is not None or self.share is not None

    def __post_init__(self) -> None:
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"loss.limit.margin: expected a number, found {self.margin}")
        if self.share is not None and not is_positive(self.share):
            raise ValueError(f"loss.limit.share: expected a number over 0, found {self.share}")


@dataclass(frozen=True)
class GuideConfig:
    """Removes negatives that another model, the guide, scores near its score of the positive (arXiv 2402.16829).

    The guide embeds the texts without the prompts of the training data, with its own.
    """

    model: str = ""
    """Folder or hub name of the guide. Empty: no guide."""
    margin: float = 0.0
    """Remove negatives that the guide scores above its score of the positive - margin."""
    embed: Literal["auto", "before", "beside"] = "auto"
    """When the guide embeds. before: each text of the training data once, before the first step, into embedding stores
    in data.cache, which later runs use, too. beside: the texts of each batch, beside the towers. auto: before, if the
    stores are in data.cache already or the run draws as many texts as two passes over the data; otherwise, and with
    mine_every, beside."""

    @property
    def given(self) -> bool:
        """Whether there is a guide."""
        return bool(self.model)

    def __post_init__(self) -> None:
        if not math.isfinite(self.margin):
            raise ValueError(f"loss.guide.margin: expected a number, found {self.margin}")
        if self.margin and not self.model:
            raise ValueError(f"loss.guide.margin: expected 0 without loss.guide.model, found {self.margin}")
        if self.embed != "auto" and not self.model:
            raise ValueError(f"loss.guide.embed: expected auto without loss.guide.model, found {self.embed}")


@dataclass(frozen=True)
class TeacherConfig:
    """Distillation from a teacher: from its scores in the data, or from its embeddings of all texts.

    A teacher that is a model embeds every text of the training data once, before the first step, into embedding stores
    in data.cache.
    """

    kind: Literal["none", "kl", "margin_mse", "pool_kl"] = "none"
    """What is added to the loss. kl: KL divergence between the teacher's and the model's distribution over a query's
    positives and hard negatives, with the scores of data.sources. margin_mse: squared difference between the teacher's
    and the model's margin of the first positive over each of the others (arXiv 2010.02666), with the same scores.
    pool_kl: KL divergence over all passages of the batch, from embeddings. none: nothing."""
    model: str = ""
    """Folder or hub name of the teacher model."""
    passages: str = ""
    """Embedding store with the teacher's embeddings of the passages, matched by text or id. Needs loss.teacher.queries
    or loss.teacher.model for the queries. Empty: model embeds the passages."""
    queries: str = ""
    """Embedding store with the teacher's embeddings of the queries, matched by text or id. Empty: model embeds them."""
    scale: float | None = None
    """Factor of the teacher's scores, 1 / temperature. None: loss.logit_scale for pool_kl, otherwise 1."""
    weight: float = 1.0
    """Factor of the added term."""
    regression: float = 0.0
    """Factor of a further term, the mean of 1 - cos(W e, t) over all texts of the batch, with the teacher's embedding t
    of the text and a linear projection W that is trained beside the model and not saved with it (stella, arXiv
    2412.19048). 0: no such term."""

    @property
    def uses_scores(self) -> bool:
        """Whether the scores of the data are used."""
        return self.kind in ("kl", "margin_mse")

    @property
    def uses_embeddings(self) -> bool:
        """Whether the teacher's embeddings are used."""
        return self.kind == "pool_kl" or self.regression > 0

    def __post_init__(self) -> None:
        if self.scale is not None and not is_positive(self.scale):
            raise ValueError(f"loss.teacher.scale: expected a number over 0, found {self.scale}")
        if not is_positive(self.weight):
            raise ValueError(f"loss.teacher.weight: expected a number over 0, found {self.weight}")
        if not 0 <= self.regression < math.inf:
            raise ValueError(f"loss.teacher.regression: expected a number of at least 0, found {self.regression}")
        if self.uses_embeddings and not (self.model or (self.passages and self.queries)):
            raise ValueError(
                "loss.teacher.model: expected a teacher model, or stores of both passages and queries, with "
                "loss.teacher.kind pool_kl or loss.teacher.regression, found none"
            )
        if not self.uses_embeddings and (self.model or self.passages or self.queries):
            raise ValueError(
                "loss.teacher.kind: expected pool_kl, or a loss.teacher.regression, with a teacher's model or stores, "
                f"found {self.kind}"
            )


@dataclass(frozen=True)
class MatryoshkaConfig:
    """Trains prefixes of the embeddings too, so that they can be truncated (arXiv 2205.13147).

    The loss is the weighted sum of the losses of the prefixes, each scaled to unit length. All other options apply to
    each prefix, with its own scores. Statistics are those of the longest prefix.
    """

    dims: tuple[int, ...] = ()
    """Sizes of the prefixes, increasing; the last is usually the full dimension. Empty: the full dimension only."""
    weights: tuple[float, ...] = ()
    """Weight of the loss of each prefix. Empty: 1 each."""

    @property
    def given(self) -> bool:
        """Whether prefixes are trained."""
        return bool(self.dims)

    def __post_init__(self) -> None:
        if any(one >= other for one, other in zip((0, *self.dims), self.dims, strict=False)):
            raise ValueError(f"loss.matryoshka.dims: expected increasing sizes from 1, found {list(self.dims)}")
        if self.weights and len(self.weights) != len(self.dims):
            raise ValueError(
                f"loss.matryoshka.weights: expected {len(self.dims)}, one for each of dims, found {len(self.weights)}"
            )
        if not all(map(is_positive, self.weights)):
            raise ValueError(f"loss.matryoshka.weights: expected numbers over 0, found {list(self.weights)}")


@dataclass(frozen=True)
class SourceLossConfig:
    """Settings of the loss for the batches of one source, instead of those in `loss`. None: that of `loss`."""

    logit_scale: float | None = None
    """Initial logit scale of this source; with loss.learn_logit_scale it is learned apart from the others."""
    limit: Annotated[LimitConfig | None, AvoidSubcommands] = None
    """Limit of the scores of negatives. Without margin and share: no limit."""
    guide: bool = True
    """Whether loss.guide removes negatives of this source."""
    hardness: float | None = None
    """See loss.hardness."""
    same_side: bool | None = None
    """See loss.same_side."""

    @property
    def given(self) -> dict[str, Any]:
        """The settings of this source by name."""
        values = {name: getattr(self, name) for name in ("logit_scale", "limit", "hardness", "same_side")}
        given = {name: value for name, value in values.items() if value is not None}
        return given if self.guide else {**given, "guide": GuideConfig()}
