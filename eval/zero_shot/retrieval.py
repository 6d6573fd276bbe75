"""Zero-shot retrieval of images by captions and of captions by images, where an image may have several captions.

Recall@k is that of the CLIP papers and of CLIP_benchmark (zeroshot_retrieval.py): the share of queries with any of
their positives among the first k.
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
    """How well captions find their images, and images their captions."""

    measures: dict[str, float]
    """image_retrieval_recall@k and image_retrieval_median_rank (captions are the queries); text_retrieval_… likewise
    (images are the queries). Places count from 1; a recall is absent where fewer than k are ranked."""
    chance: dict[str, float]
    """What random orders are expected to score."""
    image_ranks: np.ndarray
    """[texts]: the place of each caption's image among the images."""
    text_ranks: np.ndarray
    """[images with a caption]: the place of each image's first caption among the captions."""


def retrieve(images: np.ndarray, texts: np.ndarray, image_of_text: Sequence[int], ks: Sequence[int] = KS) -> Retrieval:
    """Rank all images for each caption and all captions for each image, and measure.

    Equal scores go by number: the image or caption that comes first in the data ranks first. Images without a caption
    are ranked and ask for nothing.

    Args:
        images: [N, D], of unit length.
        texts: [T, D], of unit length; N and T at least 1.
        image_of_text: [T], the number of each caption's image.
        ks: places that count.

    Raises:
        InputError: a vector is not finite.
        ValueError: shapes do not fit together.
    """
    images = checked(images, "images")
    texts = checked(texts, "captions", images.shape[1])
    owner = np.asarray(image_of_text, dtype=np.int64)
    if owner.shape != (len(texts),) or not len(texts) or owner.min() < 0 or owner.max() >= len(images):
        raise ValueError(f"image_of_text: expected {len(texts)} numbers of {len(images)} images")
    captioned, asking = np.unique(owner, return_inverse=True)
    order = np.argsort(asking, kind="stable")
    image_ranks = first_ranks(texts, images, np.stack([np.arange(len(texts)), owner], axis=1))
    text_ranks = first_ranks(images[captioned], texts, np.stack([asking[order], order], axis=1))
    measures: dict[str, float] = {}
    chance: dict[str, float] = {}
    several = Counter(np.bincount(asking).tolist())
    for name, ranks, positives, items in (
        ("image_retrieval", image_ranks, {1: len(texts)}, len(images)),
        ("text_retrieval", text_ranks, several, len(texts)),
    ):
        for k in ks:
            if k <= items:
                measures[f"{name}_recall@{k}"] = float((ranks <= k).mean())
                chance[f"{name}_recall@{k}"] = chance_recall(positives, items, k)
        measures[f"{name}_median_rank"] = float(np.median(ranks))
        chance[f"{name}_median_rank"] = float(chance_median_rank(positives, items))
    return Retrieval(measures, chance, image_ranks, text_ranks)


def first_ranks(queries: np.ndarray, items: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The place of the best positive of each query among all items, from 1.

    Args:
        queries: [Q, D], float32.
        items: [N, D], float32.
        pairs: [P, 2], (query, item) of every positive, by query; each query has one at the least.

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
        # The positive that ranks first: highest score, then lowest number.
        order = np.lexsort((item, -scores[query, item], query))
        first = np.searchsorted(query[order], np.arange(part.stop - part.start))
        ranks[part] = ranks_of(scores, item[order][first])
    return ranks
