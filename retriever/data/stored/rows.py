"""Rows of embedding stores for the texts of a batch: frozen passages and a teacher's embeddings."""

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


@dataclass(frozen=True)
class StoredLookup:
    """Finds the rows of a batch. Picklable, for data workers."""

    frozen: StoredTexts | None = None
    """The passages of train.query_only."""
    known: KnownPositives | None = None
    """The positives of queries that have several; None: only the drawn positive is not a negative."""
    teacher_query: StoredTexts | None = None
    teacher_passage: StoredTexts | None = None

    def rows(self, queries: Sequence[str], positives: Sequence[str], passages: Sequence[str]) -> StoredRows:
        """Return the rows of a batch.

        Args:
            queries: [M] texts without prompts.
            positives: [M] the drawn positives.
            passages: [N] all passages whose embeddings the loss gets.

        Raises:
            InputError: A text is not in a store.
        """
        positive = excluded = teacher_query = teacher_passage = None
        if self.frozen is not None:
            positive, excluded = self._frozen_rows(queries, positives)
        if self.teacher_query is not None and self.teacher_passage is not None:
            teacher_query = _all_found(self.teacher_query, queries)
            teacher_passage = _all_found(self.teacher_passage, passages)
        return StoredRows(positive, excluded, teacher_query, teacher_passage)

    def _frozen_rows(self, queries: Sequence[str], positives: Sequence[str]) -> tuple[Integers, Integers]:
        assert self.frozen is not None
        positive = _all_found(self.frozen, positives)
        # Copies of the positive elsewhere in the store are not negatives either.
        pairs = [np.stack(self.frozen.all(text_digests(positives)), axis=1)]
        if self.known is not None:
            which, keys = self.known.positives_of(text_digests(queries))
            found, rows = self.frozen.all(keys)
            pairs.append(np.stack([which[found], rows], axis=1))
        return positive, np.unique(np.concatenate(pairs), axis=0)


def _all_found(texts: StoredTexts, wanted: Sequence[str]) -> Integers:
    rows = texts.first(text_digests(wanted))
    if (rows < 0).any():
        raise InputError(f"{texts.store}: expected an embedding of {wanted[int(np.argmin(rows))]!r:.80}, found none")
    return rows
