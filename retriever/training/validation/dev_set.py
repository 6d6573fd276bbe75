"""The dev set of a run, on which the model is evaluated during training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from index.beir import BeirDataset
from index.progress import Reporter
from retriever.config.dev import DevConfig
from retriever.distributed.ranks import Ranks
from retriever.encoding.corpus import corpus_source
from retriever.encoding.encoder import EncodeOptions
from retriever.evaluation.beir import evaluate_towers
from retriever.training.validation.dev_loss import DevPairs

if TYPE_CHECKING:
    from eval.metrics import Metrics

# Passages per query that are ranked.
DEPTH = 100
# Measures whose confidence interval is recorded.
WITH_INTERVAL = ("ndcg@10", "mrr@10", "recall@100")


class DevSet(Protocol):
    """A dev set of texts or of images."""

    @property
    def metric(self) -> str:
        """Name of the measure that the best model is chosen by, for example "nDCG@10"."""

    @property
    def fingerprint(self) -> str:
        """Hash of the queries, the corpus and the judgements."""

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
        """Evaluate the towers. Every rank must call it.

        Args:
            towers: the towers, in evaluation mode and on their device.
            embeddings: folder for passage embeddings.
            options: how to encode.
            reporter: shows progress.
            loss: the loss of the run, whose logit scale the dev loss uses.
            tick: called after every micro-batch; may raise to stop the evaluation.
            ranks: ranks that share the work.

        Returns:
            Measure in lower case -> value, on rank 0; other ranks may return an empty dict.
        """


@dataclass(frozen=True)
class TextDevSet:
    """A split of a BEIR folder as dev set."""

    dataset: BeirDataset
    metric: str = "nDCG@10"
    keep_identical_ids: bool = False
    loss_batch: int | None = None
    """Number of queries in a batch of the dev loss; None: it is not computed."""

    @classmethod
    def open(cls, config: DevConfig, batch_size: int = 256) -> TextDevSet:
        """Open the split and keep its first `max_queries` queries.

        Args:
            config: the dev set.
            batch_size: number of queries in a batch of the dev loss. Default: 256.

        Raises:
            InputError: the split does not exist, or a row is invalid.
        """
        dataset = BeirDataset.open(config.path, config.split)
        # Checked now, rather than at the first evaluation.
        dataset.check(passage.id for passage in dataset.passages())
        if config.max_queries is not None:
            kept = sorted(dataset.qrels)[: config.max_queries]
            dataset = dataclasses.replace(
                dataset,
                queries={query: dataset.queries[query] for query in kept},
                qrels={query: dataset.qrels[query] for query in kept},
            )
        loss_batch = batch_size if config.loss else None
        return cls(dataset, keep_identical_ids=config.keep_identical_ids, loss_batch=loss_batch)

    @cached_property
    def pairs(self) -> DevPairs:
        """The pairs of the dev loss."""
        return DevPairs.of(self.dataset)

    @cached_property
    def fingerprint(self) -> str:
        judged = json.dumps([self.dataset.queries, self.dataset.qrels], sort_keys=True)
        corpus = corpus_source(self.dataset.corpus_file)["sha256"]
        suffix = " identical ids kept" if self.keep_identical_ids else ""
        return f"{corpus} {hashlib.sha256(judged.encode()).hexdigest()}{suffix}"

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
            # The models were compared at the start of the run. Later, different GPUs may round differently.
            same_model=True,
        )
        if metrics.identical_ids_left_out:
            reporter.line(
                f"{self.dataset.name}: passages left out because they have the id of their query and are not judged "
                f"for it: {metrics.identical_ids_left_out:,} (dev.keep_identical_ids keeps them)"
            )
        measures = {**metrics.mean, **_intervals(metrics)}
        if self.loss_batch is None or not ranks.is_first:
            return measures
        return {**measures, "loss": self.pairs.loss(towers, loss, self.loss_batch, options, tick)}


def _intervals(metrics: Metrics) -> dict[str, float]:
    """Return the bounds of the 95 % confidence intervals of some measures, as "ndcg@10_low" and "ndcg@10_high"."""
    from eval.significance import mean_interval

    if len(metrics.per_query) < 2:
        return {}
    intervals: dict[str, float] = {}
    for name in WITH_INTERVAL:
        low, high = mean_interval([values[name] for values in metrics.per_query.values()])
        # The measures are between 0 and 1.
        intervals |= {f"{name}_low": max(0.0, low), f"{name}_high": min(1.0, high)}
    return intervals


def measure_on_ranks(
    dev_set: DevSet,
    towers: Any,
    run: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    loss: nn.Module,
    tick: Callable[[], None],
    ranks: Ranks,
    sharded: bool,
) -> dict[str, float]:
    """Evaluate towers on a dev set with all ranks. Every rank must call it.

    Args:
        dev_set: the dev set.
        towers: the towers, in evaluation mode and on their device.
        run: the run folder, in which passage embeddings are stored for the evaluation.
        options: how to encode.
        reporter: shows progress.
        loss: the loss of the run.
        tick: called after every micro-batch if there is a single rank; may raise to stop the evaluation.
        ranks: the ranks.
        sharded: whether the towers are sharded. Every rank then evaluates the whole dev set, because all ranks must run
            the same micro-batches.

    Returns:
        Measure in lower case -> value, the same on all ranks.
    """
    workers = Ranks() if sharded else ranks
    # A name that does not change, so that files of a killed run are found and removed.
    embeddings = run / (f".dev{ranks.rank}" if sharded else ".dev")
    if ranks.is_first:
        for left_over in run.glob(".dev*"):
            shutil.rmtree(left_over, ignore_errors=True)
    ranks.barrier()
    try:
        measures = dev_set.measures(
            towers,
            embeddings,
            options,
            reporter,
            loss=loss,
            tick=tick if ranks.world_size == 1 else None,
            ranks=workers,
        )
        return ranks.broadcast(measures)
    finally:
        if workers.is_first:
            # Several sets have a folder each, with a number after the name.
            for folder in (embeddings, *run.glob(f"{embeddings.name}-*")):
                shutil.rmtree(folder, ignore_errors=True)
