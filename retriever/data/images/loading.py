"""Opening the training data of a run on images and captions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from index.progress import Reporter
from retriever.config.run import TrainConfig
from retriever.data.images.batches import ImageBatches, MicroBatchSettings
from retriever.data.images.chunks import PairReader
from retriever.data.images.features import FeatureStore, PlaceholderFeatures, compute_features
from retriever.data.images.file_pairs import FilePairs
from retriever.data.images.pairs import PairSource
from retriever.data.images.sources import open_pairs
from retriever.data.known_positives import find_known_positives
from retriever.data.schedules.schedule import BatchSchedule
from retriever.distributed.share import Share
from retriever.errors import ConfigError
from retriever.models.images.towers import ImageTextTowers
from retriever.utils.device import Precision
from retriever.utils.workers import data_workers


def open_image_batches(
    config: TrainConfig,
    towers: ImageTextTowers,
    cache: Path,
    *,
    precision: Precision,
    token_budget: int,
    reporter: Reporter,
    share: Share | None = None,
    dry_run: bool = False,
) -> tuple[ImageBatches, tuple[str, ...]]:
    """Open the training data of a run on images and captions.

    If the image tower is locked, the features of all images are computed first, unless they are in the cache or this is
    a dry run. See `retriever.data.loading.open_training_data` for the arguments.

    Returns:
        The batches and the sha256 of each source.

    Raises:
        ConfigError: If there is no source of images, or there is a source of texts.
        InputError: If a source is missing, broken or empty, or has too few pairs for a batch.
    """
    if not config.data.images or config.data.sources:
        raise ConfigError("data: expected data.images, and no data.sources, for a model with an image tower")
    image, workers = config.model.image, data_workers(config.data.workers, towers.device.type)
    sources: list[PairSource] = []
    for source in config.data.images:
        with reporter.bar(f"index {source.path}", None, "parts") as advance:
            sources.append(open_pairs(source, cache, workers=workers, progress=advance))
        reporter.line(f"{source.path}: {len(sources[-1]):,} pairs")
        for notice in sources[-1].notices:
            reporter.line(f"{source.path}: {notice}")
    features: list[FeatureStore | PlaceholderFeatures | None] = [None] * len(sources)
    if image.lock == "image" and dry_run:
        features = [PlaceholderFeatures(towers.image_feature_dim) for _ in sources]
    elif image.lock == "image":
        batch_size = max(1, token_budget // towers.image_tokens)
        for number, pairs in enumerate(sources):
            with reporter.bar(f"features of {pairs.name}", len(pairs), "images") as advance:
                features[number] = compute_features(
                    towers,
                    pairs,
                    cache / "features",
                    precision,
                    batch_size=batch_size,
                    workers=workers,
                    progress=advance,
                )
    schedule = BatchSchedule(
        [len(pairs) for pairs in sources],
        batch_size=config.batch_size,
        seed=config.seed,
        weights=[source.weight for source in config.data.images],
        temperature=config.data.temperature,
        epochs=None if config.steps else config.epochs,
        steps=config.steps,
        names=[source.path for source in config.data.images],
        processes=1 if share is None else share.size,
    )
    for line in schedule.describe():
        reporter.line(line)
    readers = [
        PairReader(
            source=pairs,
            transform=dataclasses.replace(
                towers.transform,
                flip=image.flip,
                crop_scale=image.crop_scale,
                crop_ratio=image.crop_ratio,
                jitter=image.jitter,
            ),
            augment=image.augment,
            tokenizer=towers.tokenizer("document"),
            prompt=towers.prompt("document"),
            max_broken=source.max_broken,
            features=store,
        )
        for pairs, source, store in zip(sources, config.data.images, features, strict=True)
    ]
    # Rows of a table may name the same image. In tars and datasets every image is one row, with all its captions.
    tables = [pairs.table for pairs in sources if isinstance(pairs, FilePairs)]
    batches = ImageBatches(
        readers,
        schedule,
        MicroBatchSettings(
            # Features of a locked encoder pass only through the projection.
            image_tokens=1 if image.lock == "image" else towers.image_tokens,
            token_budget=token_budget,
            padded=not towers.padding_free,
            device=towers.device.type,
        ),
        report=reporter.line,
        known=find_known_positives(tables, cache, reporter) if tables and config.loss.masks_false_negatives else None,
        share=share,
    )
    return batches, tuple(pairs.sha256 for pairs in sources)
