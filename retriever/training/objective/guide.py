"""The guide: another model whose scores say which negatives are probably false (GISTEmbed, arXiv 2402.16829)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from index.progress import Reporter
from losses import Guide
from retriever.config.run import TrainConfig
from retriever.data.batches import BatchDataset, Prompts, TrainingBatch
from retriever.data.micro_batches import BatchPreparer, PreparedBatch
from retriever.data.stored.rows import StoredLookup
from retriever.data.stored.texts import open_stored_texts
from retriever.data.table import ExampleTable
from retriever.distributed.agreement import ContentHash, check_same_on_ranks
from retriever.distributed.ranks import Ranks
from retriever.models.mixed_precision import mixed_precision
from retriever.models.modality import load_towers
from retriever.models.towers import Towers
from retriever.training.objective.embedded_texts import EmbeddedTexts
from retriever.training.objective.sources import SourceObjective
from retriever.training.objective.vectors import StoredVectors
from retriever.utils.device import Precision

# loss.guide.embed auto embeds before the first step if a run draws as many texts as this many passes over the data.
PASSES = 2
# Rows of a table that are read to estimate its number of texts.
SAMPLE = 256


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


class Guides(ABC):
    """A guide of a run: gives the embeddings that the loss compares."""

    sha256: str
    """Fingerprint of the model."""

    def options(
        self, batch: PreparedBatch, objectives: Sequence[SourceObjective], device: torch.device
    ) -> list[Guide | None]:
        """Return the guide of each part of a batch, or of the batch; None for a source without one.

        Args:
            batch: The batch, or the share of this rank.
            objectives: How the loss of each source is computed.
            device: Device of the loss.
        """
        parts = batch.parts or (batch,)
        configs = [objectives[part.source].loss.guide for part in parts]
        if not any(config.given for config in configs):
            return [None] * len(parts)
        return [
            Guide(query, passage, config.margin) if config.given else None
            for (query, passage), config in zip(self._embeddings(batch, parts, device), configs, strict=True)
        ]

    @abstractmethod
    def _embeddings(
        self, batch: PreparedBatch, parts: Sequence[PreparedBatch], device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        """The embeddings [M, G] of the queries and [N, G] of the pool of each part."""


@dataclass(frozen=True)
class GuideModel(Guides):
    """A guide that embeds the texts of each batch, beside the towers and without gradients."""

    towers: Towers
    precision: Precision
    sha256: str

    def preparer(self, prepare: Any, token_budget: int) -> GuidedPreparer:
        """Return a preparer that adds the inputs of the guide to the batches of `prepare`."""
        prompts = Prompts(self.towers.prompt("query"), self.towers.prompt("document"))
        return GuidedPreparer(prepare, BatchPreparer.of(self.towers, token_budget), prompts)

    @torch.no_grad()
    def _embeddings(
        self, batch: PreparedBatch, parts: Sequence[PreparedBatch], device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        inputs = PreparedBatch(batch.guide, batch.queries, None)
        with mixed_precision(self.towers, self.precision):
            embeddings = [group.embed(self.towers, rows) for group in inputs.groups for rows in group.micro_batches]
        query, passage = inputs.merge_embeddings(embeddings, device)
        queries = query.split([part.queries for part in parts])
        passages = passage.split([part.pool_size for part in parts])
        return list(zip(queries, passages, strict=True))


@dataclass(frozen=True)
class StoredGuide(Guides):
    """A guide that has embedded all texts before the first step."""

    query: StoredVectors
    passage: StoredVectors
    sha256: str

    def _embeddings(
        self, batch: PreparedBatch, parts: Sequence[PreparedBatch], device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        found = []
        for part in parts:
            assert part.stored is not None
            rows = part.stored.guide_query, part.stored.guide_passage
            assert rows[0] is not None and rows[1] is not None
            found.append((self.query.rows(rows[0], device), self.passage.rows(rows[1], device)))
        return found


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


def embedded_before(
    config: TrainConfig, guide: GuideModel, batches: BatchDataset[PreparedBatch], cache: Path
) -> EmbeddedTexts | None:
    """The texts that a guide embeds before the first step; None if it embeds beside the towers (`loss.guide.embed`)."""
    choice = config.loss.guide.embed
    texts = EmbeddedTexts(guide.towers, batches.tables, batches.corpus, cache, guide.precision)
    if choice == "auto":
        if config.mine_every is not None:
            return None
        drawn = len(batches) * (config.batch_size * config.data.texts_per_query + config.data.random_passages)
        known = sum(_text_count(table) for table in batches.tables) + len(batches.corpus or ())
        choice = "before" if drawn >= PASSES * known or texts.complete else "beside"
    return texts if choice == "before" else None


def embed_before(
    guide: GuideModel,
    texts: EmbeddedTexts,
    batches: BatchDataset[PreparedBatch],
    cache: Path,
    *,
    reporter: Reporter,
    ranks: Ranks,
) -> StoredGuide:
    """Embed all texts with a guide unless that is done, and let the batches have the rows of their texts.

    Args:
        guide: The guide.
        texts: What `embedded_before` returned.
        batches: The training data.
        cache: Folder of converted data.
        reporter: Receives progress and messages.
        ranks: The ranks; every one must call it.

    Raises:
        InputError: A store is damaged.
    """
    queries, passages = (texts.store(kind, "guide", reporter, ranks) for kind in ("queries", "passages"))
    with ranks.first_rank_first():
        of_queries, of_passages = (open_stored_texts(store, cache) for store in (queries, passages))
    lookup = batches.stored or StoredLookup(known=batches.known)
    batches.stored = replace(lookup, guide_query=of_queries, guide_passage=of_passages)
    return StoredGuide(StoredVectors(queries), StoredVectors(passages), guide.sha256)


def _text_count(table: ExampleTable) -> float:
    """Estimate the number of texts of a table from some of its rows."""
    rows = np.linspace(0, len(table) - 1, min(len(table), SAMPLE)).astype(int)
    counts = [1 + len(table[int(row)].positives) + len(table[int(row)].negatives) for row in rows]
    return float(len(table) * np.mean(counts))
