"""The guide: another model whose scores say which negatives are probably false (GISTEmbed, arXiv 2402.16829)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from losses import Guide
from retriever.config.run import TrainConfig
from retriever.data.batches import Prompts, TrainingBatch
from retriever.data.micro_batches import BatchPreparer, PreparedBatch
from retriever.distributed.agreement import ContentHash, check_same_on_ranks
from retriever.distributed.ranks import Ranks
from retriever.models.mixed_precision import mixed_precision
from retriever.models.towers import Towers, load_towers
from retriever.training.objective.sources import SourceObjective
from retriever.utils.device import Precision


@dataclass(frozen=True)
class GuidedPreparer:
    """Prepares a batch for the towers and its texts for the guide. Picklable, for worker processes."""

    prepare: BatchPreparer
    guide: BatchPreparer
    prompts: Prompts
    """Those of the guide. It does not see the prompts of the training data."""

    def __call__(self, batch: TrainingBatch) -> PreparedBatch:
        parts = batch.parts or (batch,)
        queries = [self.prompts.query + text for part in parts for text in part.texts.queries]
        passages = [self.prompts.passage + text for part in parts for text in part.texts.passages]
        return replace(self.prepare(batch), guide=self.guide.inputs(queries, passages))


@dataclass(frozen=True)
class GuideModel:
    """A guide that embeds the texts of each batch, beside the towers and without gradients."""

    towers: Towers
    precision: Precision
    sha256: str
    """Fingerprint of the model."""

    def preparer(self, prepare: Any, token_budget: int) -> GuidedPreparer:
        """Return a preparer that adds the inputs of the guide to the batches of `prepare`."""
        prompts = Prompts(self.towers.prompt("query"), self.towers.prompt("document"))
        return GuidedPreparer(prepare, BatchPreparer.of(self.towers, token_budget), prompts)

    @torch.no_grad()
    def options(
        self, batch: PreparedBatch, objectives: Sequence[SourceObjective], device: torch.device
    ) -> list[Guide | None]:
        """Embed the texts of a batch, or of the share of this rank.

        Args:
            batch: The batch.
            objectives: How the loss of each source is computed.
            device: Device of the loss.

        Returns:
            The guide of each part of the batch, or of the batch; None for a source without one.
        """
        parts = batch.parts or (batch,)
        configs = [objectives[part.source].loss.guide for part in parts]
        if not any(config.given for config in configs):
            return [None] * len(parts)
        inputs = PreparedBatch(batch.guide, batch.queries, None)
        with mixed_precision(self.towers, self.precision):
            embeddings = [group.embed(self.towers, rows) for group in inputs.groups for rows in group.micro_batches]
        query, passage = inputs.merge_embeddings(embeddings, device)
        queries = query.split([part.queries for part in parts])
        passages = passage.split([part.pool_size for part in parts])
        return [
            Guide(of_queries, of_passages, config.margin) if config.given else None
            for of_queries, of_passages, config in zip(queries, passages, configs, strict=True)
        ]


def open_guide(config: TrainConfig, device: torch.device, precision: Precision, ranks: Ranks) -> GuideModel | None:
    """Load the guide of a run on its device; None if the run has none. Every rank must call it.

    Raises:
        InputError: The model cannot be read.
        RanksDifferError: The guide differs between ranks.
    """
    if not config.loss.guide.given:
        return None
    towers = load_towers(config.loss.guide.model, device)
    sha256 = towers.fingerprint()["sha256"]
    check_same_on_ranks(ranks, {"loss.guide.model": ContentHash(sha256, config.loss.guide.model)})
    if device.type == "cuda":
        towers.enable_packing()
    return GuideModel(towers, precision, sha256)
