"""Zero-shot evaluation of an image–text model during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from eval.zero_shot.data import Sample, ZeroShotSet
from eval.zero_shot.evaluate import Embedded, score
from eval.zero_shot.opening import open_set
from index.files import InputError
from index.progress import Reporter
from retriever.config.dev import DevConfig
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.files import ticking
from retriever.encoding.image_encoder import DECODE_BATCH, ImageDecoder, embed_readable
from retriever.errors import ConfigError
from retriever.models.images.towers import ImageTextTowers

_METRICS = {"retrieval": "recall@1", "classification": "acc1", "multilabel": "mean_average_precision"}


@dataclass(frozen=True)
class ImageDevSet:
    """A zero-shot dataset as dev set."""

    dataset: ZeroShotSet

    @classmethod
    def open(cls, config: DevConfig) -> ImageDevSet:
        """Open the dataset.

        Raises:
            ConfigError: an option of text dev sets is set.
            InputError: the dataset does not exist.
        """
        if config.max_queries is not None:
            raise ConfigError("dev.max_queries: expected none for a set of images, all of which are evaluated")
        if config.keep_identical_ids:
            raise ConfigError("dev.keep_identical_ids: expected false for a set of images")
        if config.loss:
            raise ConfigError("dev.loss: expected false for a set of images")
        return cls(open_set(Path(config.path), config.split))

    @property
    def metric(self) -> str:
        """Name of the measure that the best model is chosen by. recall@1 is the mean of both directions."""
        return _METRICS[self.dataset.task]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the dataset."""
        return self.dataset.sha256()

    def measures(
        self,
        towers: Any,
        embeddings: Path,
        options: EncodeOptions,
        reporter: Reporter,
        *,
        loss: nn.Module,
        tick: Callable[[], None] | None,
        ranks: Ranks,
    ) -> dict[str, float]:
        """Evaluate on rank 0 with `evaluate`; other ranks return an empty dict."""
        return self.evaluate(towers, options, reporter, tick=tick) if ranks.is_first else {}

    def evaluate(
        self,
        towers: ImageTextTowers,
        options: EncodeOptions,
        reporter: Reporter,
        *,
        tick: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Evaluate the towers.

        Args:
            towers: the towers, in evaluation mode and on their device.
            options: how to encode.
            reporter: shows progress.
            tick: called after every micro-batch; may raise to stop the evaluation.

        Returns:
            Measure -> value, including `metric`.

        Raises:
            InputError: no image can be read.
        """
        images = self._embed_images(towers, options, reporter, tick)
        scored = score(
            self.dataset,
            images,
            lambda texts: embed_texts(towers, texts, "document", options, ticking(lambda count: None, tick)),
            sha256=self.fingerprint,
        )
        measures = dict(scored.result.measures)
        if self.dataset.task == "retrieval":
            recalls = [measures[f"{direction}_retrieval_recall@1"] for direction in ("image", "text")]
            measures["recall@1"] = float(np.mean(recalls))
        return measures

    def _embed_images(
        self, towers: ImageTextTowers, options: EncodeOptions, reporter: Reporter, tick: Callable[[], None] | None
    ) -> Embedded:
        dataset = self.dataset
        samples: list[Sample] = []
        vectors: list[np.ndarray] = []
        unreadable: dict[str, str] = {}
        bar = reporter.bar(f"{dataset.name}: images", len(dataset.samples), "images")
        with bar as advance, ImageDecoder(towers) as decoder:
            progress = ticking(advance, tick)
            for start in range(0, len(dataset.samples), DECODE_BATCH):
                window = dataset.samples[start : start + DECODE_BATCH]
                embeddings, errors = embed_readable(
                    towers, decoder, [sample.image for sample in window], options, progress
                )
                unreadable.update((window[row].image.name, reason) for row, reason in errors.items())
                rows = [row for row in range(len(window)) if row not in errors]
                samples += [window[row] for row in rows]
                vectors.append(embeddings[rows])
        if not samples:
            name, reason = next(iter(unreadable.items()))
            raise InputError(f"{dataset.path}: expected images, found none that can be read; {name}: {reason}")
        return Embedded(samples, np.concatenate(vectors), unreadable)
