"""Zero-shot evaluation while a model of pictures and texts trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.zero_shot.data import Sample, ZeroShotSet
from eval.zero_shot.evaluate import Embedded, score
from eval.zero_shot.opening import open_set
from index.files import InputError
from index.progress import Reporter
from retriever.config.run import DevConfig
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.files import ticking
from retriever.encoding.image_encoder import DECODE_BATCH, ImageDecoder, embed_readable
from retriever.errors import ConfigError
from retriever.models.images.towers import ImageTextTowers

_METRICS = {"retrieval": "recall@1", "classification": "acc1", "multilabel": "mean_average_precision"}


@dataclass(frozen=True)
class ImageDev:
    """The set of pictures that a run is evaluated on."""

    dataset: ZeroShotSet

    @classmethod
    def open(cls, config: DevConfig) -> ImageDev:
        """Read what describes the set.

        Raises:
            InputError: there is no such set.
        """
        if config.max_queries is not None:
            raise ConfigError("dev.max_queries: expected none for a set of pictures, which is evaluated whole")
        if config.keep_identical_ids:
            raise ConfigError("dev.keep_identical_ids: expected false for a set of images")
        return cls(open_set(Path(config.path), config.split))

    @property
    def metric(self) -> str:
        """What a model is chosen by; recall@1 is the mean of both directions."""
        return _METRICS[self.dataset.task]

    @cached_property
    def fingerprint(self) -> str:
        """What the scores of a run are measured on."""
        return self.dataset.sha256()

    def measures(
        self,
        towers: Any,
        embeddings: Path,
        options: EncodeOptions,
        reporter: Reporter,
        *,
        tick: Callable[[], None] | None,
        ranks: Ranks,
    ) -> dict[str, float]:
        """Those of `evaluate`, which the first rank makes alone; none on the others."""
        return self.evaluate(towers, options, reporter, tick=tick) if ranks.first else {}

    def evaluate(
        self,
        towers: ImageTextTowers,
        options: EncodeOptions,
        reporter: Reporter,
        *,
        tick: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """The measures of the set, `metric` among them.

        Args:
            towers: in evaluation mode, on the device to use.
            tick: called after every micro-batch; may raise to end the evaluation.

        Raises:
            InputError: no picture can be read.
        """
        images = self._embedded(towers, options, reporter, tick)
        found = score(
            self.dataset,
            images,
            lambda texts: embed_texts(towers, texts, "document", options, ticking(lambda count: None, tick)),
            sha256=self.fingerprint,
        )
        measures = dict(found.result.measures)
        if self.dataset.task == "retrieval":
            both = [measures[f"{way}_retrieval_recall@1"] for way in ("image", "text")]
            measures["recall@1"] = float(np.mean(both))
        return measures

    def _embedded(
        self, towers: ImageTextTowers, options: EncodeOptions, reporter: Reporter, tick: Callable[[], None] | None
    ) -> Embedded:
        dataset = self.dataset
        samples: list[Sample] = []
        vectors: list[np.ndarray] = []
        broken: dict[str, str] = {}
        bar = reporter.bar(f"{dataset.name}: pictures", len(dataset.samples), "pictures")
        with bar as advance, ImageDecoder(towers) as decoder:
            progress = ticking(advance, tick)
            for start in range(0, len(dataset.samples), DECODE_BATCH):
                some = dataset.samples[start : start + DECODE_BATCH]
                found, why = embed_readable(towers, decoder, [sample.image for sample in some], options, progress)
                broken.update((some[row].image.name, reason) for row, reason in why.items())
                rows = [row for row in range(len(some)) if row not in why]
                samples += [some[row] for row in rows]
                vectors.append(found[rows])
        if not samples:
            name, reason = next(iter(broken.items()))
            raise InputError(f"{dataset.path}: expected pictures, found none that can be read; {name}: {reason}")
        return Embedded(samples, np.concatenate(vectors), broken)
