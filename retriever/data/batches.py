"""Training batches: texts with prompts, and ids with which the loss masks false negatives."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from retriever.data.false_negatives import FalseNegatives, Integers, find_false_negatives, number_texts
from retriever.data.known_positives import KnownPositives, text_digests
from retriever.data.schedule import BatchSchedule
from retriever.data.sources import Example
from retriever.data.table import ExampleTable
from retriever.data.teacher_lists import TeacherLists
from retriever.distributed.share import Share
from retriever.utils.workers import init_worker

T = TypeVar("T")

# Second word of the seed for drawing positives and negatives; see schedule.py for the others.
_CHOICE = 3


@dataclass(frozen=True)
class Prompts:
    """Prompts that are put before the texts of one source."""

    query: str = ""
    passage: str = ""

    def of_row(self, example: Example) -> Prompts:
        """Return the prompts of a row, which may have its own."""
        query, passage = example.query_prompt, example.passage_prompt
        return Prompts(self.query if query is None else query, self.passage if passage is None else passage)


@dataclass(frozen=True)
class PairKeys:
    """Integer keys of the texts of a batch or of one rank's share. Texts that differ only in white space have equal
    keys."""

    queries: Integers
    """[M]"""
    positives: Integers
    """[M]"""
    negatives: Integers
    """[N - M]"""
    known: Integers
    """[K, 2]: further pairs (query, passage) that are known to be positive."""

    def false_negatives(self) -> FalseNegatives:
        """Return the false negatives of a batch that consists of these texts."""
        return find_false_negatives(self.queries, self.positives, self.negatives, self.known)


@dataclass(frozen=True)
class TrainingBatch:
    """The texts of one step, prompts included. With several ranks, the share of one rank.

    The passages of the loss are the positives, in the order of the queries, followed by all negatives. Every passage is
    a negative of all other queries.
    """

    source: int
    """Index of the source of the batch."""
    queries: list[str]
    """[M]"""
    positives: list[str]
    """[M], one for each query."""
    negatives: list[str]
    """[N - M], at most `negatives_per_query` for each query."""
    false_negatives: FalseNegatives | None
    """Masks of the loss. None with several ranks, because they depend on the texts of the other ranks."""
    keys: PairKeys | None = None
    """With several ranks: digests of the texts, without prompts. None with one rank."""
    teacher: TeacherLists | None = None
    """A teacher's scores of positives and negatives; None if no row of the source has any."""

    @property
    def passages(self) -> list[str]:
        """[N], positives then negatives."""
        return self.positives + self.negatives


class BatchDataset(Dataset[T], Generic[T]):
    """Dataset whose item `step` is the batch of that step, passed through `prepare`."""

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
        """Create a dataset over `tables`.

        If a row has several positives or negatives, they are drawn at random, determined by the schedule's seed, the
        step and the row's position in the batch.

        Args:
            tables: The examples of each source.
            schedule: The rows of each step.
            prepare: Function applied to every batch, for example tokenization.
            prompts: Prompts of each table. Default: None, no prompts.
            negatives_per_query: Largest number of hard negatives per query. Default: 0.
            known: Positives of the queries with several positives, over all tables. Default: None.
            share: Rank and number of ranks; only the rows of this rank are read. Default: None, a single rank.

        Raises:
            ValueError: If `negatives_per_query` is negative, or the numbers of tables and prompts differ.
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
        """The rows of each step."""
        return self._schedule

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._schedule)

    def __getitem__(self, step: int) -> T:
        return self._prepare(self.batch(step))

    def loader(self, *, start: int = 0, workers: int = 0) -> DataLoader[T]:
        """Return a `batch_loader` from step `start` to the last."""
        return batch_loader(self, start=start, workers=workers)

    def in_memory(self, workers: int) -> int:
        """Return the number of batches that are in memory at the same time."""
        return 1 + 2 * workers

    def batch(self, step: int) -> TrainingBatch:
        """Return the batch of a step, 0 <= step < len(self), before `prepare`."""
        source, rows = self._schedule.rows(step)
        generator = np.random.default_rng([self._schedule.seed, _CHOICE, step])
        # Drawn for all rows of the batch, so that the result does not depend on the number of ranks.
        positive_draws, negative_seeds = generator.random(len(rows)), generator.integers(2**63, size=len(rows))
        queries: list[str] = []
        positives: list[str] = []
        negatives: list[str] = []
        prompts: list[Prompts] = []
        negative_prompts: list[str] = []
        # Passage rows and scores of each query. The negatives follow the positives of all queries.
        lists: list[list[tuple[int, float]]] = []
        positions = self._share.of(len(rows))
        for number, position in enumerate(positions):
            example = self._tables[source][int(rows[position])]
            drawn_positive = int(positive_draws[position] * len(example.positives))
            count = min(self._negatives_per_query, len(example.negatives))
            drawn = random.Random(int(negative_seeds[position])).sample(range(len(example.negatives)), count)
            queries.append(example.query)
            positives.append(example.positives[drawn_positive])
            lists.append(_teacher_list(example, number, drawn_positive, len(positions) + len(negatives), drawn))
            negatives += [example.negatives[i] for i in drawn]
            prompts.append(self._prompts[source].of_row(example))
            negative_prompts += [prompts[-1].passage] * count
        keys = self._keys(queries, positives, negatives)
        return TrainingBatch(
            source,
            [prompt.query + text for prompt, text in zip(prompts, queries, strict=True)],
            [prompt.passage + text for prompt, text in zip(prompts, positives, strict=True)],
            [prompt + text for prompt, text in zip(negative_prompts, negatives, strict=True)],
            false_negatives=keys.false_negatives() if self._share.size == 1 else None,
            keys=keys if self._share.size > 1 else None,
            # Depends on the source alone, so that all ranks have lists or none has.
            teacher=TeacherLists.of(lists) if self._tables[source].rows_with_scores else None,
        )

    def _keys(self, queries: list[str], positives: list[str], negatives: list[str]) -> PairKeys:
        known = np.empty((0, 2), np.int64)
        if self._share.size == 1 and self._known is None:
            # Within one process, numbering the texts is cheaper than hashing them.
            passages = number_texts([*positives, *negatives])
            return PairKeys(number_texts(queries), passages[: len(positives)], passages[len(positives) :], known)
        query_keys, positive_keys, negative_keys = map(text_digests, (queries, positives, negatives))
        if self._share.size == 1 and self._known is not None:
            known = self._known.pairs(query_keys, np.concatenate([positive_keys, negative_keys]))
        return PairKeys(query_keys, positive_keys, negative_keys, known)

    @property
    def known(self) -> KnownPositives | None:
        """Positives of the queries with several positives; None if there are none."""
        return self._known


def _teacher_list(
    example: Example, query: int, positive: int, first_negative: int, drawn: Sequence[int]
) -> list[tuple[int, float]]:
    """Return passage rows and scores of the drawn positive and negatives; empty for a row without scores."""
    if example.scores is None:
        return []
    scores = example.scores[len(example.positives) :]
    negatives = [(first_negative + i, scores[negative]) for i, negative in enumerate(drawn)]
    return [(query, example.scores[positive]), *negatives]


def batch_loader(
    dataset: BatchDataset[T], *, start: int = 0, stop: int | None = None, workers: int = 0, prefetch: int = 2
) -> DataLoader[T]:
    """Return a loader of the batches of consecutive steps.

    It has its own random generator and does not change torch's global one, so dropout does not depend on the number of
    workers or on resuming.

    Args:
        dataset: The batches.
        start: First step. Default: 0.
        stop: Step after the last. Default: None, the end.
        workers: Number of worker processes. Default: 0, the calling process.
        prefetch: Number of batches that each worker prepares in advance. Default: 2.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, len(dataset) if stop is None else stop),
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=init_worker if workers else None,
    )


def _unchanged(batch: Any) -> Any:
    return batch
