"""False negatives of a batch that lies on several ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from retriever.data.false_negatives import FalseNegatives, find_false_negatives, ranks_rows
from retriever.data.known_positives import KnownPositives
from retriever.data.micro_batches import PreparedBatch
from retriever.distributed.ranks import Ranks


def with_pool_false_negatives(batch: PreparedBatch, ranks: Ranks, known: KnownPositives | None) -> PreparedBatch:
    """One rank's share with the false negatives among all ranks' texts. Every rank calls it; a whole batch stays as it
    is.

    Ranks exchange 8 bytes a text, and 16 for each pair that their rows are known to hold. Of the result's `excluded`,
    the queries are rows of this rank and the passages rows of the pool, in which each rank's positives and negatives
    follow those of the rank before.
    """
    keys = batch.keys
    if keys is None:
        return batch
    shares = [
        ranks.all_gather_rows(each) for each in (keys.queries, keys.positives, keys.negatives, keys.known.reshape(-1))
    ]
    queries, positives, negatives, pairs = (np.concatenate(share) for share in shares)
    pairs = pairs.reshape(-1, 2)
    if known is not None:
        pairs = np.concatenate([pairs, known.pairs(queries, np.concatenate([positives, negatives]))])
    found = find_false_negatives(queries, positives, negatives, pairs)
    counts = [[len(each) for each in share] for share in shares[1:3]]
    own_pairs, own_negatives = (ranks_rows(some)[ranks.rank] for some in counts)
    # Where each passage of (all positives, all negatives) stands in the pool.
    of_positives, of_negatives = (ranks_rows(some) for some in counts)
    order = np.concatenate(
        [
            np.concatenate([np.arange(a.start, a.stop), len(positives) + np.arange(b.start, b.stop)])
            for a, b in zip(of_positives, of_negatives, strict=True)
        ]
    )
    pool_rows = np.empty(len(order), dtype=np.int64)
    pool_rows[order] = np.arange(len(order))
    rows, columns = found.excluded.T
    mine = (rows >= own_pairs.start) & (rows < own_pairs.stop)
    first_ids, last_ids = np.split(found.passage_ids, [len(positives)])
    own = FalseNegatives(
        found.query_ids[own_pairs],
        np.concatenate([first_ids[own_pairs], last_ids[own_negatives]]),
        np.stack([rows[mine] - own_pairs.start, pool_rows[columns[mine]]], axis=1),
        masked=found.any,
        nothing_left=found.no_negatives,
    )
    return replace(batch, false_negatives=own)
