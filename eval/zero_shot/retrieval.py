"""Zero-shot retrieval of images by captions and of captions by images; an image may have several captions.

Recall@k is defined as in the CLIP papers and CLIP_benchmark (zeroshot_retrieval.py): the share of queries with at
least one positive in the top k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.zero_shot.chance import chance_median_rank, chance_recall
from eval.zero_shot.scores import blocks, checked, ranks_of

KS = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """The result of zero-shot retrieval in both directions."""

    measures: dict[str, float]
    """image_retrieval_recall@k and image_retrieval_median_rank (queries are captions); text_retrieval_… (queries are
    images). Ranks start at 1; recall@k is omitted if there are fewer than k items."""
    chance: dict[str, float]
    """Expected measures of a random order."""
    image_ranks: np.ndarray
    """int64 [T]: the rank of each caption's image."""
    text_ranks: np.ndarray
    """int64 [images with a caption]: the rank of the best caption of each image."""


def retrieve(images: np.ndarray, texts: np.ndarray, image_of_text: Sequence[int], ks: Sequence[int] = KS) -> Retrieval:
    """Rank all images for each caption and all captions for each image, and compute recall@k and median rank.

    Ties are broken by index in the data, lower first. Images without a caption are ranked but are not queries.

    Args:
        images: image embeddings [N, D], normalized, N at least 1.
        texts: caption embeddings [T, D], normalized, T at least 1.
        image_of_text: for each caption, the index of its image, [T].
        ks: the cut-offs.

    Raises:
        InputError: an embedding is not finite.
        ValueError: the shapes do not match.
    """
    images = checked(images, "images")
    texts = checked(texts, "captions", images.shape[1])
    owner = np.asarray(image_of_text, dtype=np.int64)
    if owner.shape != (len(texts),) or not len(texts) or owner.min() < 0 or owner.max() >= len(images):
        raise ValueError(f"image_of_text: expected {len(texts)} numbers of {len(images)} images")
    captioned, query_of_text = np.unique(owner, return_inverse=True)
    order = np.argsort(query_of_text, kind="stable")
    image_ranks = first_ranks(texts, images, np.stack([np.arange(len(texts)), owner], axis=1))
    text_ranks = first_ranks(images[captioned], texts, np.stack([query_of_text[order], order], axis=1))
    measures: dict[str, float] = {}
    chance: dict[str, float] = {}
    caption_counts = Counter(np.bincount(query_of_text).tolist())
    for name, ranks, positives, items in (
        ("image_retrieval", image_ranks, {1: len(texts)}, len(images)),
        ("text_retrieval", text_ranks, caption_counts, len(texts)),
    ):
        for k in ks:
            if k <= items:
                measures[f"{name}_recall@{k}"] = float((ranks <= k).mean())
                chance[f"{name}_recall@{k}"] = chance_recall(positives, items, k)
        measures[f"{name}_median_rank"] = float(np.median(ranks))
        chance[f"{name}_median_rank"] = float(chance_median_rank(positives, items))
    return Retrieval(measures, chance, image_ranks, text_ranks)


def first_ranks(queries: np.ndarray, items: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The rank, from 1, of the best positive of each query among all items.

    Args:
        queries: float32 [Q, D].
        items: float32 [N, D].
        pairs: [P, 2], the (query, item) index pairs of all positives, sorted by query; at least one per query.

    Returns:
        int64 [Q].
    """
    starts = np.searchsorted(pairs[:, 0], np.arange(len(queries) + 1))
    if (np.diff(starts) < 1).any():
        raise ValueError("pairs: expected a positive for every query, in the order of queries")
    ranks = np.empty(len(queries), dtype=np.int64)
    for part, scores in blocks(queries, items):
        own = pairs[starts[part.start] : starts[part.stop]]
        query, item = own[:, 0] - part.start, own[:, 1]
        # The best positive has the highest score, then the lowest index.
        order = np.lexsort((item, -scores[query, item], query))
        first = np.searchsorted(query[order], np.arange(part.stop - part.start))
        ranks[part] = ranks_of(scores, item[order][first])
    return ranks
