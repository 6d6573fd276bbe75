"""Training batches: texts with prompts, and the ids by which a loss knows a false negative."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from retriever.data.schedule import BatchSchedule, Share
from retriever.data.table import ExampleTable
from retriever.workers import become_worker

T = TypeVar("T")

# Beside the keys in schedule.py: which positive and which negatives a row shows at a step.
_CHOICE = 3


@dataclass(frozen=True)
class Prompts:
    """What is put before each text of one source."""

    query: str = ""
    passage: str = ""


@dataclass(frozen=True)
class PairDigests:
    """What tells the texts of one rank's pairs from others: 64 bits of a hash, int64. Two of a million texts share
    theirs once in 37 million batches, and then one passage less is a negative of one query."""

    queries: npt.NDArray[np.int64]
    """[M]"""
    positives: npt.NDArray[np.int64]
    """[M]"""
    negatives: npt.NDArray[np.int64]
    """[N - M]"""

    @classmethod
    def of(cls, queries: Sequence[str], positives: Sequence[str], negatives: Sequence[str]) -> PairDigests:
        """Digests of texts without prompts."""
        return cls(*(_digests(texts) for texts in (queries, positives, negatives)))


def _digests(texts: Iterable[str]) -> npt.NDArray[np.int64]:
    content = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(content, dtype="<i8").astype(np.int64)


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
    query_ids: npt.NDArray[np.int64]
    """[M]; a passage with the id of a query is no negative of it."""
    passage_ids: npt.NDArray[np.int64]
    """[N]"""
    digests: PairDigests | None = None
    """Of a share, whose ids know nothing of the other ranks' texts."""

    @property
    def passages(self) -> list[str]:
        """[N], positives then negatives."""
        return self.positives + self.negatives


def false_negative_ids(
    queries: Sequence[Hashable], positives: Sequence[Hashable], negatives: Sequence[Hashable]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids int64 ([M], [N]) by which no passage is a negative of a query that another pair of the batch gives it to.

    The distinct query texts and the distinct passage texts are the nodes of a graph with an edge from each query to
    its positive; an id is the number of a connected component. So queries of one text share all their positives,
    queries of one positive share it, and a hard negative that is somebody's positive carries that one's id.

    Ids make classes, and "answers" is no equivalence: where a query text comes with several positives and one of them
    comes with another query text too, all these positives are taken out of both queries. No pair of the batch is left
    among the negatives; a few true negatives may be left out. For the same reason a query's positives that were not
    drawn for this batch make no edge: on WordNet at a batch of 65,536 they would chain 11,000 words into one class.

    Whatever is equal for equal texts may stand for a text.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    query_nodes, passage_nodes = _numbered(queries), _numbered([*positives, *negatives])
    first_passage = int(query_nodes.max(initial=-1)) + 1
    nodes = first_passage + int(passage_nodes.max(initial=-1)) + 1
    edges = (query_nodes, first_passage + passage_nodes[: len(positives)])
    graph = coo_array((np.ones(len(queries), dtype=np.int8), edges), shape=(nodes, nodes))
    component = connected_components(graph, directed=False)[1].astype(np.int64)
    return component[query_nodes], component[first_passage + passage_nodes]


def _numbered(texts: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Equal texts get equal numbers, counted from 0."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int64)


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
        share: Share | None = None,
    ) -> None:
        """Batches over `tables`, in the order of `schedule`; which of several positives and negatives a row shows is
        drawn from the schedule's seed, the step and the row's place. `prompts`: one for each table. `share`: of each
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
        digests = PairDigests.of(queries, positives, negatives) if self._share.size > 1 else None
        query_ids, passage_ids = false_negative_ids(queries, positives, negatives)
        prompts = self._prompts[source]
        return TrainingBatch(
            source,
            [prompts.query + text for text in queries],
            [prompts.passage + text for text in positives],
            [prompts.passage + text for text in negatives],
            query_ids,
            passage_ids,
            digests,
        )


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
        worker_init_fn=become_worker if workers else None,
    )


def _unchanged(batch: Any) -> Any:
    return batch
