"""Training batches: texts with prompts, and ids with which the loss masks false negatives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from retriever.data.false_negatives import FalseNegatives, Integers, find_false_negatives, number_texts
from retriever.data.known_positives import KnownPositives, text_digests
from retriever.data.passage_choice import (
    Choice,
    PassageSettings,
    choose_passages,
    offsets_of,
    without_known_positives,
)
from retriever.data.schedules.clustered import ClusteredSchedule
from retriever.data.schedules.mixture import MixedSchedule
from retriever.data.schedules.schedule import BatchSchedule
from retriever.data.sources import Example
from retriever.data.stored.corpus import CorpusTable
from retriever.data.stored.rows import StoredLookup, StoredRows
from retriever.data.stored.teacher_lists import TeacherLists
from retriever.data.table import ExampleTable
from retriever.distributed.share import Share
from retriever.utils.workers import init_worker

T = TypeVar("T")
Item = TypeVar("Item")

_ChosenRow = tuple[int, Example, Choice]
"""Source, row and the passages of it that are used."""

# Second word of the seed for drawing positives and negatives; see schedules/ for the others.
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
    """[N - M]: the other passages of the pool, further positives included."""
    known: Integers
    """[K, 2]: further pairs (query, passage) that are known to be positive."""

    def false_negatives(self) -> FalseNegatives:
        """Return the false negatives of a batch that consists of these texts."""
        return find_false_negatives(self.queries, self.positives, self.negatives, self.known)


@dataclass(frozen=True)
class PoolTexts:
    """Queries [M] and passages [N] of the pool, without prompts."""

    queries: Sequence[str] = ()
    passages: Sequence[str] = ()


@dataclass(frozen=True)
class TrainingBatch:
    """The texts of one step, prompts included. With several ranks, the share of one rank.

    The passages of the loss are the positives, in the order of the queries, further positives, and the negatives that
    all queries see. Each of them is a negative of all other queries.
    """

    source: int
    """Index of the source of the batch; of several, the first."""
    queries: list[str]
    """[M]"""
    positives: list[str]
    """[M], one for each query."""
    negatives: list[str]
    """[H], hard negatives that all queries see."""
    false_negatives: FalseNegatives | None
    """Masks of the loss. None with several ranks, because they depend on the texts of the other ranks."""
    keys: PairKeys | None = None
    """With several ranks: digests of the texts, without prompts. None with one rank."""
    teacher: TeacherLists | None = None
    """A teacher's scores of positives and negatives; None if no row of the source has any."""
    further_positives: list[str] = field(default_factory=list)
    """[F]"""
    positive_pairs: Integers | None = None
    """[F, 2]: pairs (query row, passage row) of the further positives; None if each query has one positive."""
    own_negatives: list[str] = field(default_factory=list)
    """Hard negatives of query 0, then of query 1, and so on, that only their own query sees."""
    own_offsets: Integers | None = None
    """[M + 1]: the first of `own_negatives` of each query, and their number; None if all queries see the negatives."""
    stored: StoredRows | None = None
    """Rows of the texts in embedding stores; None if the loss reads none."""
    texts: PoolTexts = PoolTexts()
    """Queries and passages without prompts."""

    parts: tuple[TrainingBatch, ...] = ()
    """Batches whose passages are not negatives of each other's queries; empty for a batch that is one block. Only the
    parts have masks, pairs and lists then."""
    loss_share: float = 1.0
    """Share of this part in the queries of the batch over all ranks, and in its loss."""

    @classmethod
    def of_parts(cls, parts: Sequence[TrainingBatch], loss_shares: Sequence[float]) -> TrainingBatch:
        """Return the batch of several parts with losses of their own."""
        return cls(
            parts[0].source,
            _flat([part.queries for part in parts]),
            _flat([part.positives for part in parts]),
            _flat([part.negatives for part in parts]),
            false_negatives=None,
            parts=tuple(replace(part, loss_share=share) for part, share in zip(parts, loss_shares, strict=True)),
        )

    @property
    def passages(self) -> list[str]:
        """[N], the pool: positives, further positives, negatives."""
        return self.positives + self.further_positives + self.negatives


class BatchDataset(Dataset[T], Generic[T]):
    """Dataset whose item `step` is the batch of that step, passed through `prepare`."""

    def __init__(
        self,
        tables: Sequence[ExampleTable],
        schedule: BatchSchedule | MixedSchedule | ClusteredSchedule,
        prepare: Callable[[TrainingBatch], T],
        *,
        prompts: Sequence[Prompts] | None = None,
        passages: PassageSettings | None = None,
        known: KnownPositives | None = None,
        share: Share | None = None,
        separate_blocks: bool = False,
        corpus: CorpusTable | None = None,
        random_passages: int = 0,
    ) -> None:
        """Create a dataset over `tables`.

        If a row has several positives or negatives, they are drawn at random, determined by the schedule's seed, the
        step and the row's position in the batch.

        Args:
            tables: The examples of each source.
            schedule: The rows of each step.
            prepare: Function applied to every batch, for example tokenization.
            prompts: Prompts of each table. Default: None, no prompts.
            passages: How many positives and hard negatives of a row are used. Default: None, one positive.
            known: Positives of the queries with several positives, over all tables. Default: None.
            share: Rank and number of ranks; only the rows of this rank are read. Default: None, a single rank.
            separate_blocks: Whether only passages of the same source are negatives of a query, if a batch has rows of
                several sources. Default: False.
            corpus: Passages from which further negatives of all queries are drawn. Default: None.
            random_passages: Number of passages drawn at each step. Default: 0.

        Raises:
            ValueError: If the numbers of tables and prompts differ.
        """
        if prompts is not None and len(prompts) != len(tables):
            raise ValueError(f"prompts: expected {len(tables)}, one for each table, found {len(prompts)}")
        self._tables = list(tables)
        self._schedule = schedule
        self.prepare = prepare
        """Applied to every batch."""
        self._prompts = list(prompts or [Prompts()] * len(tables))
        self._passages = passages or PassageSettings()
        self._known = known if known is not None and len(known) else None
        self._share = share or Share()
        self._separate_blocks = separate_blocks
        self.corpus = corpus
        self._random_passages = random_passages
        self.stored: StoredLookup | None = None
        """Finds the texts of a batch in embedding stores; set before the first batch."""

    @property
    def schedule(self) -> BatchSchedule | MixedSchedule | ClusteredSchedule:
        """The rows of each step."""
        return self._schedule

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._schedule)

    def __getitem__(self, step: int) -> T:
        return self.prepare(self.batch(step))

    def loader(self, *, start: int = 0, stop: int | None = None, workers: int = 0) -> DataLoader[T]:
        """Return a `batch_loader` from step `start` to the last, or up to step `stop`."""
        return batch_loader(self, start=start, stop=stop, workers=workers)

    @property
    def tables(self) -> list[ExampleTable]:
        """The examples of each source."""
        return list(self._tables)

    def with_tables(self, tables: Sequence[ExampleTable]) -> BatchDataset[T]:
        """Return the same batches with other tables of the same rows, for example with other hard negatives."""
        other = copy.copy(self)
        other._tables = list(tables)
        return other

    def in_memory(self, workers: int) -> int:
        """Return the number of batches that are in memory at the same time."""
        return 1 + 2 * workers

    def batch(self, step: int) -> TrainingBatch:
        """Return the batch of a step, 0 <= step < len(self), before `prepare`."""
        blocks = self._schedule.blocks(step)
        total = sum(len(rows) for _, rows in blocks)
        generator = np.random.default_rng([self._schedule.seed, _CHOICE, step])
        # Drawn for all rows of the batch, so that the result does not depend on the number of ranks.
        positive_draws, negative_seeds = generator.random(total), generator.integers(2**63, size=total)
        chosen: list[list[_ChosenRow]] = []
        start = 0
        for source, rows in blocks:
            chosen.append([])
            for position in self._share.of(len(rows)):
                example = self._tables[source][int(rows[position])]
                draw, seed = positive_draws[start + position], int(negative_seeds[start + position])
                chosen[-1].append((source, example, choose_passages(example, self._passages, draw, seed)))
            start += len(rows)
        if not self._separate_blocks or len(blocks) == 1:
            return self._assemble(_flat(chosen), [source for source, _ in blocks], self._random_texts(step))
        parts = [self._assemble(rows, [source], []) for rows, (source, _) in zip(chosen, blocks, strict=True)]
        return TrainingBatch.of_parts(parts, [len(rows) / total for _, rows in blocks])

    def _random_texts(self, step: int) -> list[str]:
        """Return this rank's share of the passages that are drawn from the corpus."""
        if self.corpus is None:
            return []
        rows = self.corpus.draw(self._schedule.seed, step, self._random_passages)
        return [self.corpus[int(rows[i])] for i in self._share.of(len(rows))]

    def _assemble(self, chosen: Sequence[_ChosenRow], sources: Sequence[int], random_texts: list[str]) -> TrainingBatch:
        """Return the batch of some rows of these sources, with the passages that were chosen, and random passages."""
        examples = [example for _, example, _ in chosen]
        rows = [(example, choice) for _, example, choice in chosen]
        queries = [example.query for example in examples]
        positives = [example.positives[choice.positive] for example, choice in rows]
        further = [[example.positives[i] for i in choice.further] for example, choice in rows]
        negatives = [[example.negatives[i] for i in choice.negatives] for example, choice in rows]
        several, own = self._passages.positives == "all", self._passages.negatives_seen_by == "own"
        pairs = None
        if several:
            pair_rows = np.repeat(np.arange(len(rows)), [len(texts) for texts in further])
            pairs = np.stack([pair_rows, len(rows) + np.arange(len(pair_rows))], axis=1).astype(np.int64)
        if own:
            kept = without_known_positives(queries, negatives, self._known)
            negatives = [[texts[i] for i in indices] for texts, indices in zip(negatives, kept, strict=True)]
        others = _flat(further) + ([] if own else _flat(negatives)) + random_texts
        keys = self._keys(queries, positives, others)
        stored = None if self.stored is None else self.stored.rows(queries, positives, positives + others)
        prompts = [self._prompts[source].of_row(example) for source, example, _ in chosen]
        prompted = [
            _flat([[prompt.passage + text for text in texts] for prompt, texts in zip(prompts, lists, strict=True)])
            for lists in (further, negatives)
        ]
        masks = keys.false_negatives() if self._share.size == 1 else None
        random_prompted = [self._prompts[sources[0]].passage + text for text in random_texts]
        return TrainingBatch(
            sources[0],
            [prompt.query + text for prompt, text in zip(prompts, queries, strict=True)],
            [prompt.passage + text for prompt, text in zip(prompts, positives, strict=True)],
            ([] if own else prompted[1]) + random_prompted,
            false_negatives=masks if masks is None or pairs is None else masks.without(pairs),
            keys=keys if self._share.size > 1 else None,
            teacher=None if own else self._teacher_lists(sources, rows),
            further_positives=prompted[0],
            positive_pairs=pairs,
            own_negatives=prompted[1] if own else [],
            own_offsets=offsets_of([len(texts) for texts in negatives]) if own else None,
            stored=stored,
            texts=PoolTexts(queries, positives + others),
        )

    def _teacher_lists(self, sources: Sequence[int], rows: Sequence[tuple[Example, Choice]]) -> TeacherLists | None:
        # Depends on the sources alone, so that all ranks have lists or none has.
        if not any(self._tables[source].rows_with_scores for source in sources):
            return None
        # The further positives of all queries follow their positives, and the negatives of all follow those.
        further, lists = len(rows), []
        first_negative = further + sum(len(choice.further) for _, choice in rows)
        for query, (example, choice) in enumerate(rows):
            lists.append(_teacher_list(example, query, choice, further, first_negative))
            further += len(choice.further)
            first_negative += len(choice.negatives)
        return TeacherLists.of(lists)

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
    example: Example, query: int, choice: Choice, first_further: int, first_negative: int
) -> list[tuple[int, float]]:
    """Return passage rows and scores of the drawn positives and negatives; empty for a row without scores."""
    if example.scores is None:
        return []
    further = [(first_further + i, example.scores[positive]) for i, positive in enumerate(choice.further)]
    scores = example.scores[len(example.positives) :]
    negatives = [(first_negative + i, scores[negative]) for i, negative in enumerate(choice.negatives)]
    return [(query, example.scores[choice.positive]), *further, *negatives]


def _flat(lists: Sequence[Sequence[Item]]) -> list[Item]:
    return [item for items in lists for item in items]


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
