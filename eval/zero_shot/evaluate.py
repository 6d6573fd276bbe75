"""A model on a set of images: embed images and texts, score; what was embedded is kept and used again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from eval.zero_shot.classification import Classification, EmbedTexts, class_vectors, classify, classify_multilabel
from eval.zero_shot.data import Sample, ZeroShotSet
from eval.zero_shot.retrieval import Retrieval, retrieve
from index.files import InputError
from index.image_files import ImageAt
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

IMAGES_AT_ONCE = 256
# Images a shard; at most so many are lost when a run is killed.
SHARD_ROWS = 4096

EmbedImages = Callable[[Sequence[ImageAt]], tuple[np.ndarray, dict[int, str]]]
"""n images -> float32 [n, D], of unit length, and why which of them cannot be read; their vectors are not looked at."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Embedded:
    """The images of a set that can be read, with their vectors."""

    samples: list[Sample]
    vectors: np.ndarray
    """[N, D], float32, of the `samples`."""
    broken: dict[str, str]
    """Name of each image that cannot be read -> why."""


@dataclass(frozen=True)
class Evaluated:
    """What a model scored on a set."""

    dataset: ZeroShotSet
    result: Classification | Retrieval
    images: Embedded
    texts: np.ndarray
    """[C, D] of the classes, or [T, D] of the captions, in the order of `captions`."""
    captions: list[str]
    owners: list[int]
    """The number of each caption's image among `images.samples`."""
    sha256: str
    """Of the set."""
    seconds: dict[str, float]


def embed_set(
    dataset: ZeroShotSet,
    embed: EmbedImages,
    folder: Path,
    *,
    dim: int,
    model: dict[str, str],
    source: dict[str, str],
    progress: Progress | None = None,
) -> Embedded:
    """Embed the images of a set into a store in `folder`, which is continued or used again if it is there.

    The store has a row for every image, so that the next run knows where to go on; an image that cannot be read has a
    row of zeros, and its text says why.

    Args:
        dataset: the images.
        embed: embeds some of them.
        folder: of the store.
        dim: D.
        model: what identifies the model.
        source: what identifies the images and the arithmetic.
        progress: called with the number of images done since the last call, those of an earlier run included.

    Raises:
        InputError: `folder` holds something else, or no image can be read.
    """
    header = {"set": dataset.name, **source}
    with EmbeddingWriter(folder, dim=dim, model=model, source=header, shard_rows=SHARD_ROWS) as writer:
        if progress is not None and writer.rows:
            progress(writer.rows)
        last = writer.rows if writer.complete else len(dataset.samples)
        for start in range(writer.rows, last, IMAGES_AT_ONCE):
            images = [sample.image for sample in dataset.samples[start : start + IMAGES_AT_ONCE]]
            vectors, broken = embed(images)
            vectors = np.array(vectors, dtype=np.float32)
            vectors[list(broken)] = 0
            # Names may come twice, and may hold what ids may not.
            ids = [f"{start + n}:{quote(image.name)}" for n, image in enumerate(images)]
            writer.append([Passage(id_, "", broken.get(n, "")) for n, id_ in enumerate(ids)], vectors)
            if progress is not None:
                progress(len(images))
    return _readable(dataset, EmbeddingStore.open(folder))


def _readable(dataset: ZeroShotSet, store: EmbeddingStore) -> Embedded:
    if store.rows != len(dataset.samples):
        raise InputError(f"{store.folder}: expected {len(dataset.samples)} images, found {store.rows}")
    pairs = zip(dataset.samples, store.passages(), strict=True)
    broken = {sample.image.name: passage.text for sample, passage in pairs if passage.text}
    vectors = store.vectors().astype(np.float32, copy=False)
    whole = vectors.any(axis=1)
    if not whole.any():
        name, why = next(iter(broken.items()), (store.folder, "vectors of zeros"))
        raise InputError(f"{dataset.path}: expected images, found none that can be read; the first, {name}: {why}")
    samples = [dataset.samples[row] for row in np.flatnonzero(whole).tolist()]
    return Embedded(samples, vectors[whole], broken)


def score(
    dataset: ZeroShotSet,
    images: Embedded,
    embed_texts: EmbedTexts,
    *,
    sha256: str,
    progress: Progress | None = None,
) -> Evaluated:
    """Embed the prompts or captions of a set, and measure.

    Args:
        dataset: the set.
        images: what can be read of it, embedded.
        embed_texts: embeds prompts and captions, in the same space and of unit length.
        sha256: of the set.
        progress: called with the number of texts done since the last call.

    Raises:
        InputError: a vector is not finite, or no image that can be read has a caption.
    """
    started = time.perf_counter()
    captions = [text for sample in images.samples for text in sample.captions]
    owners = [number for number, sample in enumerate(images.samples) for _ in sample.captions]
    if dataset.task == "retrieval":
        if not captions:
            raise InputError(f"{dataset.path}: expected an image with captions that can be read, found none")
        texts = embed_texts(captions)
        if progress is not None:
            progress(len(captions))
    else:
        texts = class_vectors(dataset.classes, dataset.templates, embed_texts, progress)
    embedded = time.perf_counter()
    result: Classification | Retrieval
    if dataset.task == "retrieval":
        result = retrieve(images.vectors, texts, owners)
    elif dataset.task == "classification":
        labels = [sample.labels[0] for sample in images.samples]
        result = classify(images.vectors, texts, labels, dataset.classes)
    else:
        result = classify_multilabel(
            images.vectors, texts, [sample.labels for sample in images.samples], dataset.classes
        )
    seconds = {"texts": embedded - started, "measures": time.perf_counter() - embedded}
    return Evaluated(dataset, result, images, texts, captions, owners, sha256, seconds)
