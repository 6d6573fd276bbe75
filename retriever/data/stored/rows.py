"""Rows of embedding stores for the texts of a batch: frozen passages, a teacher's and a guide's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from index.files import InputError
from retriever.data.false_negatives import Integers
from retriever.data.known_positives import KnownPositives, text_digests
from retriever.data.stored.texts import StoredTexts


@dataclass(frozen=True)
class StoredRows:
    """Rows of stores that belong to a batch, or to the share of one rank."""

    positive: Integers | None = None
    """[M] rows of frozen passages: the positive of each query. None without frozen passages."""
    excluded: Integers | None = None
    """[R, 2] pairs (query row, frozen row) that are not negatives: the positive and all known positives."""
    teacher_query: Integers | None = None
    """[M] rows of the teacher's query embeddings. None without a teacher."""
    teacher_passage: Integers | None = None
    """[N] rows of the teacher's passage embeddings."""
    guide_query: Integers | None = None
    """[M] rows of the guide's query embeddings. None without a guide, or if it embeds beside the towers."""
    guide_passage: Integers | None = None
    """[N] rows of the guide's passage embeddings."""


@dataclass(frozen=True)
class StoredLookup:
    """Finds the rows of a batch. Picklable, for data workers."""

    frozen: StoredTexts | None = None
    """The passages of train.query_only."""
    known: KnownPositives | None = None
    """The positives of queries that have several; None: only the drawn positive is not a negative."""
    teacher_query: StoredTexts | None = None
    teacher_passage: StoredTexts | None = None
    guide_query: StoredTexts | None = None
    guide_passage: StoredTexts | None = None

    @property
    def checksums(self) -> list[str]:
        """What tells these stores from others, by all their files."""
        stores = (self.frozen, self.teacher_query, self.teacher_passage, self.guide_query, self.guide_passage)
        return [store.path.stem for store in stores if store is not None]

    def rows(self, queries: Sequence[str], positives: Sequence[str], passages: Sequence[str]) -> StoredRows:
        """Return the rows of a batch.

        Args:
            queries: [M] texts without prompts.
            positives: [M] the drawn positives.
            passages: [N] all passages whose embeddings the loss gets.

        Raises:
            InputError: A text is not in a store.
        """
        positive = excluded = None
        if self.frozen is not None:
            positive, excluded = self._frozen_rows(queries, positives)
        return StoredRows(
            positive,
            excluded,
            _all_found(self.teacher_query, queries),
            _all_found(self.teacher_passage, passages),
            _all_found(self.guide_query, queries),
            _all_found(self.guide_passage, passages),
        )

    def _frozen_rows(self, queries: Sequence[str], positives: Sequence[str]) -> tuple[Integers, Integers]:
        assert self.frozen is not None
        positive = _all_found(self.frozen, positives)
        assert positive is not None
        # Copies of the positive elsewhere in the store are not negatives either.
        pairs = [np.stack(self.frozen.all(text_digests(positives)), axis=1)]
        if self.known is not None:
            which, keys = self.known.positives_of(text_digests(queries))
            found, rows = self.frozen.all(keys)
            pairs.append(np.stack([which[found], rows], axis=1))
        return positive, np.unique(np.concatenate(pairs), axis=0)


def _all_found(texts: StoredTexts | None, wanted: Sequence[str]) -> Integers | None:
    if texts is None:
        return None
    rows = texts.first(text_digests(wanted))
    if (rows < 0).any():
        raise InputError(f"{texts.store}: expected an embedding of {wanted[int(np.argmin(rows))]!r:.80}, found none")
    return rows
