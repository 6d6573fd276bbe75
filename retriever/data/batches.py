"""Training batches: texts with prompts, and the ids by which a loss knows a false negative."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from retriever.data.false_negatives import FalseNegatives, Integers, find_false_negatives, numbered
from retriever.data.known_positives import KnownPositives, digests
from retriever.data.schedule import BatchSchedule
from retriever.data.table import ExampleTable
from retriever.distributed.share import Share
from retriever.utils.workers import init_worker

T = TypeVar("T")

# Beside the keys in schedule.py: which positive and which negatives a row shows at a step.
_CHOICE = 3


@dataclass(frozen=True)
class Prompts:
    """What is put before each text of one source."""

    query: str = ""
    passage: str = ""


@dataclass(frozen=True)
class PairKeys:
    """Integers for the texts of a batch, or of one rank's share of it: equal for texts that are equal but for
    spacing, and only for these."""

    queries: Integers
    """[M]"""
    positives: Integers
    """[M]"""
    negatives: Integers
    """[N - M]"""
    known: Integers
    """[K, 2]: further pairs of a query and a passage that the rows of the share are known to hold."""

    def false_negatives(self) -> FalseNegatives:
        """Those of a batch of these pairs."""
        return find_false_negatives(self.queries, self.positives, self.negatives, self.known)


@dataclass(frozen=True)
class TrainingBatch:
    """The texts of one step, prompts included; of several ranks, one rank's share of them.

    The passages of the loss are the positives, in the order of the queries, then all negatives; every negative is
    one for every query.
    """

    source: int
    """Index of the source that the batch comes from."""
    queries: list[str]
    """[M]"""
    positives: list[str]
    """[M], one for each query."""
    negatives: list[str]
    """[N - M], at most `negatives_per_query` for each query."""
    false_negatives: FalseNegatives | None
    """Of a whole batch; a share knows nothing of the other ranks' texts."""
    keys: PairKeys | None = None
    """Of a share: digests of its texts, without prompts."""

    @property
    def passages(self) -> list[str]:
        """[N], positives then negatives."""
        return self.positives + self.negatives


class BatchDataset(Dataset[T], Generic[T]):
    """The batch of each step, made ready by `prepare` (a tokenizer, say), in whichever process asks for it."""

    def __init__(
        self,
        tables: Sequence[ExampleTable],
        schedule: BatchSchedule,
        prepare: Callable[[TrainingBatch], T],
        *,
        prompts: Sequence[Prompts] | None = None,
        negatives_per_query: int = 0,
        known: KnownPositives | None = None,
        share: Share | None = None,
    ) -> None:
        """Batches over `tables`, in the order of `schedule`; which of several positives and negatives a row shows is
        drawn from the schedule's seed, the step and the row's place. `prompts`: one for each table. `known`: the
        positives of queries that have several, of all tables; none where no query has. `share`: of each
        batch the part of one process, none for the whole; only its rows are read.

        Raises:
            ValueError: `negatives_per_query` is negative, or tables and prompts differ in number.
        """
        if negatives_per_query < 0:
            raise ValueError(f"negatives_per_query: expected 0 or more, found {negatives_per_query}")
        if prompts is not None and len(prompts) != len(tables):
            raise ValueError(f"prompts: expected {len(tables)}, one for each table, found {len(prompts)}")
        self._tables = list(tables)
        self._schedule = schedule
        self._prepare = prepare
        self._prompts = list(prompts or [Prompts()] * len(tables))
        self._negatives_per_query = negatives_per_query
        self._known = known if known is not None and len(known) else None
        self._share = share or Share()

    @property
    def schedule(self) -> BatchSchedule:
        """Which rows make the batch of a step."""
        return self._schedule

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._schedule)

    def __getitem__(self, step: int) -> T:
        return self._prepare(self.batch(step))

    def loader(self, *, start: int = 0, workers: int = 0) -> DataLoader[T]:
        """`batch_loader` from step `start` to the last."""
        return batch_loader(self, start=start, workers=workers)

    def waiting(self, workers: int) -> int:
        """Batches that are in memory at once."""
        return 1 + 2 * workers

    def batch(self, step: int) -> TrainingBatch:
        """The batch of a step, 0 <= step < len(self)."""
        source, rows = self._schedule.rows(step)
        chance = np.random.default_rng([self._schedule.seed, _CHOICE, step])
        # One number a row, drawn for all rows, so that each process draws what one alone would.
        of_positives, of_negatives = chance.random(len(rows)), chance.integers(2**63, size=len(rows))
        queries: list[str] = []
        positives: list[str] = []
        negatives: list[str] = []
        for place in self._share.of(len(rows)):
            example = self._tables[source][int(rows[place])]
            queries.append(example.query)
            positives.append(example.positives[int(of_positives[place] * len(example.positives))])
            if count := min(self._negatives_per_query, len(example.negatives)):
                negatives.extend(random.Random(int(of_negatives[place])).sample(example.negatives, count))
        keys = self._keys(queries, positives, negatives)
        prompts = self._prompts[source]
        return TrainingBatch(
            source,
            [prompts.query + text for text in queries],
            [prompts.passage + text for text in positives],
            [prompts.passage + text for text in negatives],
            false_negatives=keys.false_negatives() if self._share.size == 1 else None,
            keys=keys if self._share.size > 1 else None,
        )

    def _keys(self, queries: list[str], positives: list[str], negatives: list[str]) -> PairKeys:
        none = np.empty((0, 2), np.int64)
        if self._share.size == 1 and self._known is None:
            # Numbers, which cost less than digests, tell the texts of one process apart.
            passages = numbered([*positives, *negatives])
            return PairKeys(numbered(queries), passages[: len(positives)], passages[len(positives) :], none)
        of_queries, of_positives, of_negatives = (digests(texts) for texts in (queries, positives, negatives))
        if self._share.size == 1 and self._known is not None:
            none = self._known.pairs(of_queries, np.concatenate([of_positives, of_negatives]))
        return PairKeys(of_queries, of_positives, of_negatives, none)

    @property
    def known(self) -> KnownPositives | None:
        """The positives of queries that have several, where any has."""
        return self._known


def batch_loader(
    dataset: BatchDataset[T], *, start: int = 0, stop: int | None = None, workers: int = 0, ahead: int = 2
) -> DataLoader[T]:
    """A loader of the steps from `start` to `stop` (the last), in order, prepared by `workers` processes.

    It has a random generator of its own, so torch's global one is left as it is: a run that resumes, or has another
    number of workers, draws the same dropout.

    Args:
        ahead: batches each worker prepares in advance.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, len(dataset) if stop is None else stop),
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        prefetch_factor=ahead if workers else None,
        worker_init_fn=init_worker if workers else None,
    )


def _unchanged(batch: Any) -> Any:
    return batch
