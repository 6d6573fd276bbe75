"""Zero-shot evaluation of a model on an image set; image embeddings are stored and reused."""

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
from index.image_files.folders import StoredImage
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

IMAGE_BATCH = 256
# Images per shard; an interrupted run loses at most one shard.
SHARD_ROWS = 4096

EmbedImages = Callable[[Sequence[StoredImage]], tuple[np.ndarray, dict[int, str]]]
"""Embed n images as normalized float32 [n, D]; also returns index -> reason for unreadable images (rows ignored)."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Embedded:
    """The readable images of a set with their embeddings."""

    samples: list[Sample]
    vectors: np.ndarray
    """Embeddings of `samples`, float32 [N, D]."""
    broken: dict[str, str]
    """Name of each unreadable image -> reason."""


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a model on one set."""

    dataset: ZeroShotSet
    result: Classification | Retrieval
    images: Embedded
    texts: np.ndarray
    """Embeddings of the classes, [C, D], or of the `captions`, [T, D]."""
    captions: list[str]
    owners: list[int]
    """For each caption, the index of its image in `images.samples`."""
    sha256: str
    """Hash of the set."""
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
    """Embed the images of a set into an embedding store; an existing store is continued or reused.

    The store has one row per image, so that an interrupted run can resume. An unreadable image has a row of zeros, and
    the reason as its text.

    Args:
        dataset: the set.
        embed: embeds a batch of images.
        folder: the folder of the store.
        dim: the dimension D of the embeddings.
        model: identifies the model in the manifest of the store.
        source: identifies the images and the arithmetic in the manifest.
        progress: called with the number of images embedded since the last call, including those of an earlier run.

    Raises:
        InputError: `folder` holds a store of something else, or no image is readable.
    """
    header = {"set": dataset.name, **source}
    with EmbeddingWriter(folder, dim=dim, model=model, source=header, shard_rows=SHARD_ROWS) as writer:
        if progress is not None and writer.rows:
            progress(writer.rows)
        last = writer.rows if writer.complete else len(dataset.samples)
        for start in range(writer.rows, last, IMAGE_BATCH):
            images = [sample.image for sample in dataset.samples[start : start + IMAGE_BATCH]]
            vectors, broken = embed(images)
            vectors = np.array(vectors, dtype=np.float32)
            vectors[list(broken)] = 0
            # Image names may repeat and may contain characters that ids may not.
            ids = [f"{start + n}:{quote(image.name)}" for n, image in enumerate(images)]
            writer.append([Passage(id_, "", broken.get(n, "")) for n, id_ in enumerate(ids)], vectors)
            if progress is not None:
                progress(len(images))
    return _readable_images(dataset, EmbeddingStore.open(folder))


def _readable_images(dataset: ZeroShotSet, store: EmbeddingStore) -> Embedded:
    if store.rows != len(dataset.samples):
        raise InputError(f"{store.folder}: expected {len(dataset.samples)} images, found {store.rows}")
    pairs = zip(dataset.samples, store.passages(), strict=True)
    broken = {sample.image.name: passage.text for sample, passage in pairs if passage.text}
    vectors = store.vectors().astype(np.float32, copy=False)
    readable = vectors.any(axis=1)
    if not readable.any():
        name, why = next(iter(broken.items()), (store.folder, "vectors of zeros"))
        raise InputError(f"{dataset.path}: expected images, found none that can be read; the first, {name}: {why}")
    samples = [dataset.samples[row] for row in np.flatnonzero(readable).tolist()]
    return Embedded(samples, vectors[readable], broken)


def score(
    dataset: ZeroShotSet,
    images: Embedded,
    embed_texts: EmbedTexts,
    *,
    sha256: str,
    progress: Progress | None = None,
) -> Evaluated:
    """Embed the prompts or captions of a set and compute the measures.

    Args:
        dataset: the set.
        images: its readable images, embedded.
        embed_texts: embeds prompts and captions in the same space; captions must be normalized.
        sha256: the hash of the set.
        progress: called with the number of texts embedded since the last call.

    Raises:
        InputError: an embedding is not finite, or no readable image has a caption.
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
        texts = class_vectors(dataset.classes, dataset.prompts, embed_texts, progress)
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
