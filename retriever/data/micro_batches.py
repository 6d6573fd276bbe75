"""From the texts of a batch to micro-batches of token ids; runs in the data workers, without any weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from retriever.data.batches import PairKeys, TrainingBatch
from retriever.data.false_negatives import FalseNegatives
from retriever.data.length_sorting import pack
from retriever.models.tokenizer import TextTokenizer, TokenizedTexts
from retriever.models.towers import Side, Towers
from retriever.utils.device import to_device, to_host


@dataclass(frozen=True)
class TextGroup:
    """Texts of one tower, cut into micro-batches."""

    side: Side
    tokens: TokenizedTexts
    micro_batches: list[np.ndarray]
    """Row numbers of each, within this group."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [texts]."""
        return self.tokens.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of the token ids."""
        return int(self.tokens.ids.nbytes + self.tokens.offsets.nbytes)

    def embed(self, towers: Towers, rows: np.ndarray) -> Tensor:
        """Embeddings [rows, dimension] of one micro-batch."""
        return towers.embed(self.tokens, rows, self.side)


class Group(Protocol):
    """What passes through one tower: texts, or the pictures of images/batches.py."""

    @property
    def micro_batches(self) -> list[np.ndarray]:
        """Row numbers of each, within the group."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""

    @property
    def nbytes(self) -> int:
        """Bytes of the token ids or pixels in host memory."""

    def embed(self, towers: Any, rows: np.ndarray) -> Tensor:
        """Embeddings [rows, dimension] of one micro-batch."""


@dataclass(frozen=True)
class PreparedBatch:
    """One step's texts as token ids: queries, then passages (positives, then hard negatives)."""

    groups: Sequence[Group]
    """One group of all texts for a shared tower, or the queries' and the passages'."""
    queries: int
    """M."""
    false_negatives: FalseNegatives | None
    """Passages that are no negatives of a query; none of a share, until the ranks have compared theirs."""
    padded: bool = True
    """Whether the texts of a micro-batch are padded to its longest, or laid end to end."""
    keys: PairKeys | None = None
    """Of one rank's share."""

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(int(group.lengths.sum()) for group in self.groups)

    @property
    def micro_batch_tokens(self) -> list[int]:
        """Tokens of each micro-batch as they pass through a tower: padding included, where there is any."""
        return [
            len(rows) * int(lengths.max()) if self.padded else int(lengths.sum())
            for group in self.groups
            for rows in group.micro_batches
            for lengths in [group.lengths[rows]]
        ]

    def arrange(self, embeddings: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Queries [M, D] and passages [N, D] on the device from the embeddings of all micro-batches, in order.

        Embeddings that wait on the host visit the device one micro-batch after another, and their gradients go back
        there alike.
        """
        first, order = 0, []
        for group in self.groups:
            order += [first + rows for rows in group.micro_batches]
            first += len(group)
        rows = to_device(torch.from_numpy(np.concatenate(order)), device)
        return _InOrder.apply(rows, self.queries, *embeddings)


class _InOrder(torch.autograd.Function):
    """Rows of micro-batches put where they belong: each has one place, so that nothing need be summed in backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, queries: int, *embeddings: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = rows
        ctx.places = [(len(some), some.device) for some in embeddings]
        ordered = embeddings[0].new_empty(len(rows), embeddings[0].shape[1], device=rows.device)
        for places, some in zip(rows.split([len(some) for some in embeddings]), embeddings, strict=True):
            ordered.index_copy_(0, places, to_device(some, rows.device) if some.device != rows.device else some)
        return ordered[:queries], ordered[queries:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ordered = torch.cat(gradients)
        sizes, devices = zip(*ctx.places, strict=True)
        shares = [
            to_host(ordered[places]) if device != ordered.device else ordered[places]
            for places, device in zip(ctx.rows.split(list(sizes)), devices, strict=True)
        ]
        if any(device != ordered.device for device in devices):
            # Whoever takes a tensor of the host takes it as it is.
            torch.cuda.current_stream(ordered.device).synchronize()
        return None, None, *shares


@dataclass(frozen=True)
class BatchPreparer:
    """Tokenizes a TrainingBatch and cuts it into micro-batches; picklable, for worker processes."""

    query: TextTokenizer
    passage: TextTokenizer
    shared: bool
    token_budget: int
    padded: bool
    device: str
    """Its type."""

    @classmethod
    def of(cls, towers: Towers, token_budget: int) -> BatchPreparer:
        """The preparer for these towers' inputs."""
        query, passage = towers.tokenizer("query"), towers.tokenizer("document")
        return cls(query, passage, towers.shared, token_budget, not towers.padding_free, towers.device.type)

    def __call__(self, batch: TrainingBatch) -> PreparedBatch:
        if self.shared:
            # Queries and passages of like length share a micro-batch.
            if self.query == self.passage:
                tokens = self.passage(batch.queries + batch.passages)
            else:
                tokens = TokenizedTexts.joined([self.query(batch.queries), self.passage(batch.passages)])
            groups = [self._group("document", tokens)]
        else:
            groups = [
                self._group("query", self.query(batch.queries)),
                self._group("document", self.passage(batch.passages)),
            ]
        return PreparedBatch(groups, len(batch.queries), batch.false_negatives, self.padded, batch.keys)

    def _group(self, side: Side, tokens: TokenizedTexts) -> TextGroup:
        cut = pack(tokens.lengths, self.token_budget, padded=self.padded, device=self.device)
        return TextGroup(side, tokens, cut)
