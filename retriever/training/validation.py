"""The dev set of a run: what its models are measured on while they are trained, and chosen by."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from index.beir import BeirDataset
from index.progress import Reporter
from retriever.config.run import DevConfig, TrainConfig
from retriever.distributed.ranks import Ranks
from retriever.encoding.corpus import corpus_source
from retriever.encoding.encoder import EncodeOptions
from retriever.evaluation.beir import evaluate_towers
from retriever.utils import own_packages

# Passages a query that are scored.
DEPTH = 100


class DevSet(Protocol):
    """What a trainer asks of either kind."""

    @property
    def metric(self) -> str:
        """What a model is chosen by: the name of one of the measures, but for capitals."""

    @property
    def fingerprint(self) -> str:
        """What the scores of a run are measured on."""

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
        """All measures, on the first of the ranks at least, which call it together.

        Args:
            towers: in evaluation mode, on the device to use.
            embeddings: a folder for those of passages, where they go to a disk.
            tick: called after every micro-batch; may raise to end the evaluation.
        """


@dataclass(frozen=True)
class TextDevSet:
    """A split of a BEIR folder."""

    dataset: BeirDataset
    metric: str = "nDCG@10"
    keep_identical_ids: bool = False

    @classmethod
    def open(cls, config: DevConfig) -> TextDevSet:
        """The split, cut to its first queries if so configured.

        Raises:
            InputError: there is none, or a row of it is bad.
        """
        dataset = BeirDataset.open(config.path, config.split)
        # Now rather than after the first hundred steps.
        dataset.check(passage.id for passage in dataset.passages())
        if config.max_queries is not None:
            kept = sorted(dataset.qrels)[: config.max_queries]
            dataset = dataclasses.replace(
                dataset,
                queries={query: dataset.queries[query] for query in kept},
                qrels={query: dataset.qrels[query] for query in kept},
            )
        return cls(dataset, keep_identical_ids=config.keep_identical_ids)

    @cached_property
    def fingerprint(self) -> str:
        judged = json.dumps([self.dataset.queries, self.dataset.qrels], sort_keys=True)
        corpus = corpus_source(self.dataset.corpus_file)["sha256"]
        kept = " identical ids kept" if self.keep_identical_ids else ""
        return f"{corpus} {hashlib.sha256(judged.encode()).hexdigest()}{kept}"

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
        _, metrics = evaluate_towers(
            towers,
            self.dataset,
            embeddings,
            options,
            reporter,
            k=DEPTH,
            tick=tick,
            ranks=ranks,
            keep_identical_ids=self.keep_identical_ids,
            # Compared when the run begins: later, other GPUs may round their steps otherwise.
            same_model=True,
        )
        if metrics.identical_ids_left_out:
            reporter.line(
                f"{self.dataset.name}: passages left out because they have the id of their query and are not judged "
                f"for it: {metrics.identical_ids_left_out:,} (dev.keep_identical_ids keeps them)"
            )
        return metrics.mean


def open_dev_set(config: TrainConfig) -> DevSet | None:
    """The dev set of a configuration, of texts or of pictures; none without a path."""
    if not config.dev.path:
        return None
    own_packages.need("eval")
    if not config.model.image.name:
        return TextDevSet.open(config.dev)
    from retriever.training.image_validation import ImageDevSet

    return ImageDevSet.open(config.dev)
