"""What the loss reads from embedding stores: the frozen passages of `query_only`, and a teacher's embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cosine_similarity

from index.progress import Reporter
from losses import Negatives, Teacher
from retriever.config.loss import LossConfig
from retriever.config.run import TrainConfig
from retriever.data.batches import BatchDataset
from retriever.data.micro_batches import PreparedBatch
from retriever.data.stored.rows import StoredLookup
from retriever.data.stored.texts import check_stored, open_stored_texts
from retriever.distributed.ranks import Ranks
from retriever.training.objective.embedded_texts import teacher_stores
from retriever.training.objective.options import LossOptions
from retriever.training.objective.query_only import check_fixed_passages, check_two_towers
from retriever.training.objective.vectors import FrozenCorpus, StoredVectors, open_verified
from retriever.utils.device import Precision, loss_device, to_device


class TeacherEmbeddings(nn.Module):
    """A teacher's embeddings, and the projection of the model's embeddings to them.

    Args:
        query: The teacher's queries.
        passage: The teacher's passages.
        dimension: D, of the model's embeddings.
        config: The configuration of the loss.
    """

    def __init__(self, query: StoredVectors, passage: StoredVectors, dimension: int, config: LossConfig) -> None:
        super().__init__()
        self._query, self._passage, self._config = query, passage, config
        width = passage.store.dim
        self.projection = nn.Linear(dimension, width, bias=False) if config.teacher.regression else None

    def of(self, batch: PreparedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """The teacher's embeddings of a batch: queries [M, T] and passages [N, T], float32."""
        assert batch.stored is not None
        rows = batch.stored.teacher_query, batch.stored.teacher_passage
        assert rows[0] is not None and rows[1] is not None
        return self._query.rows(rows[0], device), self._passage.rows(rows[1], device)

    def option(self, query: Tensor, passage: Tensor) -> Teacher | None:
        """The teacher's distribution over the pool as an option of the loss; None if it is not used."""
        teacher = self._config.teacher
        if teacher.kind != "pool_kl":
            return None
        scale = self._config.logit_scale if teacher.scale is None else teacher.scale
        return Teacher(query, passage, scale, teacher.weight)

    def regression(self, embeddings: Sequence[Tensor], teacher: Sequence[Tensor], ranks: Ranks) -> Tensor | None:
        """The regression of the teacher's embeddings, 0-dim; None if it is not used.

        With several ranks, its value is the same on all of them, and averaged gradients are those of all texts.
        """
        if self.projection is None:
            return None
        projected = self.projection(torch.cat([side.float() for side in embeddings]))
        similarity = cosine_similarity(projected, torch.cat(list(teacher)), dim=1).sum()
        rows = sum(len(side) for side in embeddings)
        texts = ranks.all_reduce_sum(rows)[0]
        term = self._config.teacher.regression * ranks.world_size * (rows - similarity) / texts
        if ranks.group is None:
            return term
        mean = term.detach().clone()
        distributed.all_reduce(mean, group=ranks.group)
        return term + (mean / ranks.world_size - term.detach())


@dataclass(frozen=True)
class StoredEmbeddings:
    """Frozen passages, a teacher, or both, and how the rows of a batch are found in them."""

    lookup: StoredLookup
    frozen: FrozenCorpus | None
    teacher: TeacherEmbeddings | None

    def apply(
        self, batch: PreparedBatch, options: LossOptions, query: Tensor, passage: Tensor, ranks: Ranks
    ) -> tuple[Tensor, LossOptions, Tensor | None]:
        """What a step adds to the arguments of the loss.

        Args:
            batch: The batch, or the share of this rank.
            options: Its options without stores.
            query: [M, D].
            passage: [N, D]; empty with frozen passages.
            ranks: The ranks; each must call it.

        Returns:
            The passages [N, D] of the loss, its options, and a 0-dim term to add to the loss or None.
        """
        if self.frozen is not None:
            return self._frozen_positives(batch, query), self._frozen_options(batch, query.device), None
        assert self.teacher is not None
        of_query, of_passage = self.teacher.of(batch, query.device)
        if (teacher := self.teacher.option(of_query, of_passage)) is not None:
            options = dataclasses.replace(options, teacher=teacher)
        regression = self.teacher.regression((query, passage[: len(of_passage)]), (of_query, of_passage), ranks)
        return passage, options, regression

    def _frozen_positives(self, batch: PreparedBatch, query: Tensor) -> Tensor:
        assert self.frozen is not None and batch.stored is not None and batch.stored.positive is not None
        return self.frozen.rows(batch.stored.positive, query.device).to(query.dtype)

    def _frozen_options(self, batch: PreparedBatch, device: torch.device) -> LossOptions:
        """The options of the exact softmax over the frozen passages.

        Every passage of the corpus counts once: the positive from the pool, and all others from the store. The other
        positives of the pool, which are in the store too, have the id of the query's positive, so they do not count.
        """
        assert self.frozen is not None and batch.stored is not None and batch.stored.excluded is not None
        same = torch.zeros(batch.queries, dtype=torch.int64, device=device)
        excluded = to_device(torch.from_numpy(batch.stored.excluded), device)
        negatives = Negatives(frozen=self.frozen.passages, frozen_excluded=excluded)
        return LossOptions(query_ids=same, passage_ids=same, negatives=negatives)


def open_stored_embeddings(
    config: TrainConfig,
    towers: Any,
    batches: BatchDataset[PreparedBatch],
    cache: Path,
    *,
    device: torch.device,
    precision: Precision,
    reporter: Reporter,
    ranks: Ranks,
) -> StoredEmbeddings:
    """Open the stores of a configuration that has some. Every rank must call it.

    Args:
        config: The configuration of the run.
        towers: The towers.
        batches: The training data.
        cache: Folder of converted data.
        device: Device of the towers.
        precision: Precision of the towers.
        reporter: Receives progress and messages.
        ranks: The ranks.

    Raises:
        InputError: A store is damaged, lacks a passage, or belongs to another model.
    """
    frozen = teacher = None
    tables, lookup = batches.tables, StoredLookup(known=batches.known)
    if config.query_only:
        check_two_towers(towers)
        store = open_verified(config.query_only, reporter)
        check_fixed_passages(config, towers, store)
        texts = _stored_texts(store, cache, ranks)
        check_stored(texts, tables, positives_only=True, setting="query_only")
        frozen = FrozenCorpus(store, config.passages_on, loss_device(device), precision)
        reporter.line(frozen.description)
        lookup = dataclasses.replace(lookup, frozen=texts)
    options = config.loss.teacher
    if options.uses_embeddings:
        stores = teacher_stores(
            options, tables, batches.corpus, cache, device=device, precision=precision, reporter=reporter, ranks=ranks
        )
        queries, passages = (_stored_texts(stores[kind], cache, ranks) for kind in ("queries", "passages"))
        if options.passages:
            check_stored(passages, tables, positives_only=False, setting="loss.teacher.passages")
        lookup = dataclasses.replace(lookup, teacher_query=queries, teacher_passage=passages)
        teacher = TeacherEmbeddings(
            StoredVectors(stores["queries"]), StoredVectors(stores["passages"]), towers.dimension, config.loss
        ).to(loss_device(device))
    return StoredEmbeddings(lookup, frozen, teacher)


def _stored_texts(store: Any, cache: Path, ranks: Ranks) -> Any:
    with ranks.first_rank_first():
        return open_stored_texts(store, cache)
