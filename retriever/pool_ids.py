"""Ids by which a loss knows a false negative, where the batch lies on several ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from retriever.data.batches import false_negative_ids
from retriever.prepare import PreparedBatch
from retriever.ranks import Ranks


def with_pool_ids(batch: PreparedBatch, ranks: Ranks) -> PreparedBatch:
    """One rank's share with ids that hold among all ranks' texts. Every rank calls it; a whole batch stays as it is.

    Ranks exchange 8 bytes a text.
    """
    digests = batch.digests
    if digests is None:
        return batch
    shares = [ranks.gathered(each) for each in (digests.queries, digests.positives, digests.negatives)]
    queries, positives, negatives = (np.concatenate(share) for share in shares)
    passages = np.concatenate([positives, negatives])
    if len(np.unique(queries)) == len(queries) and len(np.unique(passages)) == len(passages):
        return replace(batch, duplicates=False)
    query_ids, passage_ids = false_negative_ids(queries.tolist(), positives.tolist(), negatives.tolist())
    pairs, own_negatives = (_own(share, ranks.rank) for share in (shares[1], shares[2]))
    of_positives, of_negatives = np.split(passage_ids, [len(positives)])
    return replace(
        batch,
        query_ids=query_ids[pairs],
        passage_ids=np.concatenate([of_positives[pairs], of_negatives[own_negatives]]),
        duplicates=len(np.unique(passage_ids)) < len(passage_ids),
    )


def _own(shares: list[np.ndarray], rank: int) -> slice:
    """Where one rank's rows lie among all."""
    first = sum(len(share) for share in shares[:rank])
    return slice(first, first + len(shares[rank]))
