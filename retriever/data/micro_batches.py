"""Tokenization of a batch and its division into micro-batches; runs in the data workers, without weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from retriever.data.batches import PairKeys, PoolTexts, TrainingBatch
from retriever.data.false_negatives import FalseNegatives, Integers
from retriever.data.length_sorting import make_micro_batches
from retriever.data.stored.rows import StoredRows
from retriever.data.stored.teacher_lists import TeacherLists
from retriever.models.tokenizer import TextTokenizer, TokenizedTexts
from retriever.models.towers import Side, Towers
from retriever.utils.device import to_device, to_host


@dataclass(frozen=True)
class TextInputs:
    """The texts of one tower, divided into micro-batches."""

    side: Side
    tokens: TokenizedTexts
    micro_batches: list[np.ndarray]
    """Row numbers of each micro-batch, int64."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text, int64 [texts]."""
        return self.tokens.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of the token ids."""
        return int(self.tokens.ids.nbytes + self.tokens.offsets.nbytes)

    def embed(self, towers: Towers, rows: np.ndarray) -> Tensor:
        """Compute the embeddings [rows, D] of one micro-batch."""
        return towers.embed(self.tokens, rows, self.side)


class TowerInputs(Protocol):
    """The inputs of one tower: `TextInputs`, or `ImageInputs` of images/batches.py."""

    @property
    def micro_batches(self) -> list[np.ndarray]:
        """Row numbers of each micro-batch, int64."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text or image, int64."""

    @property
    def nbytes(self) -> int:
        """Bytes of the token ids or pixels in host memory."""

    def embed(self, towers: Any, rows: np.ndarray) -> Tensor:
        """Compute the embeddings [rows, D] of one micro-batch."""


@dataclass(frozen=True)
class PreparedBatch:
    """The inputs of one training step: queries, then passages, in the order of TrainingBatch: the pool (positives,
    further positives, negatives), then hard negatives that only their own query sees."""

    groups: Sequence[TowerInputs]
    """One group with all texts for a shared tower; otherwise the queries and the passages."""
    queries: int
    """Number of queries, M."""
    false_negatives: FalseNegatives | None
    """Masks of the loss. None for the share of one rank, until the ranks have exchanged `keys`."""
    padded: bool = True
    """Whether the texts of a micro-batch are padded to the longest; otherwise they are packed."""
    keys: PairKeys | None = None
    """Text digests of one rank's share; None with a single rank."""
    teacher: TeacherLists | None = None
    """A teacher's scores of passages, for `losses.TeacherScores`; None if no row of the source has any."""
    source: int = 0
    """Index of the source of the batch."""
    positive_pairs: Integers | None = None
    """[F, 2] pairs (query row, passage row) of further positives; None if each query has one. With several ranks: rows
    of this rank's passages, until `with_pool_false_negatives` makes them rows of the pool."""
    own_offsets: Integers | None = None
    """[M + 1]: the first hard negative that only its query sees, of each query, and their number; None if all queries
    see the negatives."""
    stored: StoredRows | None = None
    """Rows of the texts in embedding stores; None if the loss reads none."""
    guide: Sequence[TowerInputs] = ()
    """Inputs of the guide: the queries, then the passages of the pool; empty without a guide."""

    texts: PoolTexts | None = None
    """The texts of the queries and the pool; None if the log of the run shows none."""
    parts: tuple[PreparedBatch, ...] = ()
    """Batches without inputs, each with a loss of its own over consecutive queries and passages of this batch; empty
    for a batch that is one block."""
    passages: int = 0
    """Number of passages of a part, N."""
    loss_share: float = 1.0
    """Factor of a part's loss in the loss of the batch."""

    def split(self, query: Tensor, passage: Tensor) -> Iterator[tuple[PreparedBatch, Tensor, Tensor]]:
        """Yield each part with its queries and passages, or this batch if it has no parts.

        Args:
            query: [M, D] embeddings of all queries.
            passage: [N, D] embeddings of all passages.
        """
        if not self.parts:
            yield self, query, passage
            return
        queries = query.split([part.queries for part in self.parts])
        passages = passage.split([part.passages for part in self.parts])
        yield from zip(self.parts, queries, passages, strict=True)

    @property
    def pool_size(self) -> int:
        """Number of passages of a part that all queries see."""
        return self.passages - (0 if self.own_offsets is None else int(self.own_offsets[-1]))

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return sum(int(group.lengths.sum()) for group in self.groups)

    @property
    def micro_batch_tokens(self) -> list[int]:
        """Number of tokens of each micro-batch, including padding."""
        return [
            len(rows) * int(lengths.max()) if self.padded else int(lengths.sum())
            for group in self.groups
            for rows in group.micro_batches
            for lengths in [group.lengths[rows]]
        ]

    def merge_embeddings(self, embeddings: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Merge the embeddings of all micro-batches into one matrix, in the order of the batch.

        Args:
            embeddings: [rows, D] of each micro-batch, in order. Embeddings on the host are copied to the device one
                micro-batch at a time, and their gradients are copied back.
            device: Device of the result.

        Returns:
            Queries [M, D] and passages [N, D]: the pool, then the negatives of `own_offsets`.
        """
        start, order = 0, []
        for group in self.groups:
            order += [start + rows for rows in group.micro_batches]
            start += len(group)
        rows = to_device(torch.from_numpy(np.concatenate(order)), device)
        return _MergeRows.apply(rows, self.queries, *embeddings)


class _MergeRows(torch.autograd.Function):
    """Copy rows of several matrices to distinct rows of one matrix. Backward needs no summation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, queries: int, *embeddings: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = rows
        ctx.sizes = [len(part) for part in embeddings]
        ctx.devices = [part.device for part in embeddings]
        merged = embeddings[0].new_empty(len(rows), embeddings[0].shape[1], device=rows.device)
        for part_rows, part in zip(rows.split(ctx.sizes), embeddings, strict=True):
            merged.index_copy_(0, part_rows, to_device(part, rows.device) if part.device != rows.device else part)
        return merged[:queries], merged[queries:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        merged = torch.cat(gradients)
        parts = [
            to_host(merged[part_rows]) if device != merged.device else merged[part_rows]
            for part_rows, device in zip(ctx.rows.split(ctx.sizes), ctx.devices, strict=True)
        ]
        if any(device != merged.device for device in ctx.devices):
            # The copies to the host are asynchronous.
            torch.cuda.current_stream(merged.device).synchronize()
        return None, None, *parts


@dataclass(frozen=True)
class BatchPreparer:
    """Tokenizes a TrainingBatch and divides it into micro-batches. Picklable, for worker processes."""

    query: TextTokenizer
    passage: TextTokenizer
    shared: bool
    """Whether one tower serves both sides."""
    token_budget: int
    """Largest number of tokens in a micro-batch."""
    padded: bool
    """Whether texts are padded; otherwise they are packed."""
    device: str
    """Device type of the towers, "cpu" or "cuda"."""

    queries_only: bool = False
    """Whether the passages are left out, because their embeddings come from a store."""
    keep_texts: bool = False
    """Whether the batches have their texts, for the log."""

    @classmethod
    def of(
        cls, towers: Towers, token_budget: int, *, queries_only: bool = False, keep_texts: bool = False
    ) -> BatchPreparer:
        """Return the preparer for some towers."""
        query, passage = towers.tokenizer("query"), towers.tokenizer("document")
        padded, device = not towers.padding_free, towers.device.type
        return cls(query, passage, towers.shared, token_budget, padded, device, queries_only, keep_texts)

    def __call__(self, batch: TrainingBatch) -> PreparedBatch:
        parts = batch.parts or (batch,)
        passages = [text for part in parts for text in part.passages + part.own_negatives]
        if self.queries_only:
            return self._prepared(batch, [self._group("query", self.query(batch.queries))])
        return self._prepared(batch, self.inputs(batch.queries, passages))

    def _prepared(self, batch: TrainingBatch, groups: Sequence[TowerInputs]) -> PreparedBatch:
        return PreparedBatch(
            groups,
            len(batch.queries),
            batch.false_negatives,
            self.padded,
            batch.keys,
            teacher=batch.teacher,
            source=batch.source,
            positive_pairs=batch.positive_pairs,
            own_offsets=batch.own_offsets,
            parts=tuple(self._prepared(part, ()) for part in batch.parts),
            passages=len(batch.passages) + len(batch.own_negatives),
            loss_share=batch.loss_share,
            stored=batch.stored,
            texts=batch.texts if self.keep_texts else None,
        )

    def inputs(self, queries: list[str], passages: list[str]) -> list[TextInputs]:
        """Tokenize texts, prompts included, and divide them into micro-batches."""
        if not self.shared:
            return [self._group("query", self.query(queries)), self._group("document", self.passage(passages))]
        # Queries and passages of similar length share a micro-batch.
        if self.query == self.passage:
            tokens = self.passage(queries + passages)
        else:
            tokens = TokenizedTexts.concatenate([self.query(queries), self.passage(passages)])
        return [self._group("document", tokens)]

    def _group(self, side: Side, tokens: TokenizedTexts) -> TextInputs:
        micro_batches = make_micro_batches(tokens.lengths, self.token_budget, padded=self.padded, device=self.device)
        return TextInputs(side, tokens, micro_batches)
