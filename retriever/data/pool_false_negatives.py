"""False negatives of a batch that is distributed over ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from retriever.data.false_negatives import FalseNegatives, count_masked, find_false_negatives, rank_slices
from retriever.data.known_positives import KnownPositives
from retriever.data.micro_batches import PreparedBatch
from retriever.distributed.ranks import Ranks


def with_pool_false_negatives(batch: PreparedBatch, ranks: Ranks, known: KnownPositives | None) -> PreparedBatch:
    """Add the false negatives among the texts of all ranks to the share of this rank. Every rank must call it.

    Ranks exchange 8 bytes per text and 16 bytes per pair that is known from their rows. A batch without `keys`, which
    is not a share, is returned unchanged.

    Args:
        batch: the share of this rank.
        ranks: the ranks.
        known: the positives of queries that have several, over all data.

    Returns:
        The batch with `false_negatives`. Its `excluded` [R, 2] has rows of this rank's queries and rows of the pool, in
        which each rank's positives and then its other passages follow those of the rank before. The passages of
        `teacher` and of `positive_pairs` are rows of the pool as well.
    """
    if batch.parts:
        return replace(batch, parts=tuple(with_pool_false_negatives(part, ranks, known) for part in batch.parts))
    keys = batch.keys
    if keys is None:
        return batch
    own = (keys.queries, keys.positives, keys.negatives, keys.known.reshape(-1))
    of_ranks = [ranks.all_gather_rows(array) for array in own]
    queries, positives, negatives, pairs = (np.concatenate(arrays) for arrays in of_ranks)
    pairs = pairs.reshape(-1, 2)
    if known is not None:
        pairs = np.concatenate([pairs, known.pairs(queries, np.concatenate([positives, negatives]))])
    masks = find_false_negatives(queries, positives, negatives, pairs)
    positive_rows, negative_rows = (rank_slices([len(array) for array in arrays]) for arrays in of_ranks[1:3])
    own_positives, own_negatives = positive_rows[ranks.rank], negative_rows[ranks.rank]
    # pool_rows[i]: row in the pool of passage i of (all positives, all negatives).
    order = np.concatenate(
        [
            np.concatenate([np.arange(p.start, p.stop), len(positives) + np.arange(n.start, n.stop)])
            for p, n in zip(positive_rows, negative_rows, strict=True)
        ]
    )
    pool_rows = np.empty(len(order), dtype=np.int64)
    pool_rows[order] = np.arange(len(order))
    rows, columns = masks.excluded.T
    is_own = (rows >= own_positives.start) & (rows < own_positives.stop)
    positive_ids, negative_ids = np.split(masks.passage_ids, [len(positives)])
    own_masks = FalseNegatives(
        masks.query_ids[own_positives],
        np.concatenate([positive_ids[own_positives], negative_ids[own_negatives]]),
        np.stack([rows[is_own] - own_positives.start, pool_rows[columns[is_own]]], axis=1),
        batch_any=masks.any,
        batch_no_negatives=masks.no_negatives,
    )
    # The passages of a rank are consecutive rows of the pool.
    first = own_positives.start + own_negatives.start
    teacher = batch.teacher and batch.teacher.shifted(first)
    positive_pairs = None if batch.positive_pairs is None else batch.positive_pairs + np.array([0, first])
    if positive_pairs is not None:
        own_masks = own_masks.without(positive_pairs)
    masked = count_masked(
        own_masks.query_ids, masks.passage_ids, own_masks.excluded, own_masks.passage_ids, batch.positive_pairs
    )
    own_masks = replace(own_masks, own_masked=masked)
    return replace(batch, false_negatives=own_masks, teacher=teacher, positive_pairs=positive_pairs)
