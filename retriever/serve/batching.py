"""Batching of concurrent queries and texts: one thread runs the model and the index."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from index.ann.index import Index
from index.fields.filters import Filter, FilterError
from retriever.encoding.encoder import EncodeOptions, embed_counted
from retriever.models.loading.text_settings import SIDES, Side
from retriever.models.towers import Towers
from retriever.searching.search import Answer, results_of

if TYPE_CHECKING:
    from index.ann.multi_index import MultiIndex


class Busy(Exception):
    """Too many queries are waiting."""


class Closed(Exception):
    """The engine has been closed."""


@dataclass(frozen=True)
class Batching:
    """Limits of a batch and of the queue."""

    max_queries: int = 32
    """Maximum number of queries per batch; 1 disables batching."""
    timeout_s: float = 0.003
    """Seconds that the first query of a batch waits for others."""
    max_waiting: int = 512
    """Maximum number of waiting queries; more are refused."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of n texts."""

    vectors: np.ndarray
    """float32 [n, D]."""
    tokens: np.ndarray
    """Number of tokens of each text, int64 [n]: those that the model read, or those of the untruncated text."""


@dataclass(frozen=True)
class SearchSettings:
    """How queries are searched."""

    k: int
    """Results per query."""
    filter: Filter | None = None
    """Only passages that match."""


@dataclass(frozen=True)
class _Job:
    texts: Sequence[str]
    side: Side
    search: SearchSettings | None
    """How to search; None: only embeddings."""
    untruncated: bool = False
    """Whether to count the tokens of the texts before they are truncated."""
    future: Future[Any] = field(default_factory=Future)


class Engine:
    """Answers queries in batches, in a thread of its own. Use as a context manager, or call `close`.

    Args:
        towers: the model that embedded the passages of the index, in evaluation mode.
        index: one index, or several searched as one.
        options: precision and micro-batch size.
        batching: limits of a batch and of the queue.
        observe: called in the engine's thread with the number of texts of each batch by side.

    Raises:
        InputError: the index was made with another model.
    """

    def __init__(
        self,
        towers: Towers,
        index: Index | MultiIndex,
        options: EncodeOptions,
        batching: Batching,
        observe: Callable[[dict[str, int]], None] | None = None,
    ) -> None:
        index.check_model(towers.fingerprint())
        self.index = index
        self.towers = towers
        self._observe = observe
        self._options = options
        self._batching = batching
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="search", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Number of accepted queries and texts that are not answered yet."""
        return self._waiting

    @property
    def max_queries(self) -> int:
        """Maximum number of queries per batch."""
        return self._batching.max_queries

    @property
    def max_waiting(self) -> int:
        """Maximum number of waiting queries."""
        return self._batching.max_waiting

    @property
    def alive(self) -> bool:
        """Whether the engine accepts queries."""
        return self._thread.is_alive() and not self._closed

    def submit(self, queries: Sequence[str], k: int, filter: Filter | None = None) -> Future[list[Answer]]:
        """Queue queries.

        Returns:
            A future of the answers, in the order of the queries, with at most `k` results each.

        Raises:
            Busy: too many queries are waiting.
            Closed: the engine was closed.
        """
        return self._put(_Job(queries, "query", SearchSettings(k, filter)))

    def embed(self, texts: Sequence[str], side: Side, *, untruncated: bool = False) -> Future[Embeddings]:
        """Queue texts to be embedded.

        Args:
            texts: the texts, without prompts.
            side: "query" or "document".
            untruncated: count the tokens of the texts before they are truncated. Default: False.

        Returns:
            A future of their embeddings, in order.

        Raises:
            Busy: too many queries are waiting.
            Closed: the engine was closed.
        """
        return self._put(_Job(texts, side, None, untruncated))

    def _put(self, job: _Job) -> Future[Any]:
        with self._lock:
            if self._closed:
                raise Closed
            if self._waiting + len(job.texts) > self._batching.max_waiting:
                raise Busy
            self._waiting += len(job.texts)
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Stop accepting queries, answer those that are waiting, and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        closed = False
        while not closed:
            job = self._jobs.get()
            if job is None:
                return
            jobs, closed = self._collect(job)
            # Jobs of clients that have disconnected are cancelled.
            running = []
            for job in jobs:
                if job.future.set_running_or_notify_cancel():
                    running.append(job)
                else:
                    self._release(job)
            try:
                self._answer(running)
            except Exception as error:  # noqa: BLE001 - raised in each client's request; the next batch is answered
                for job in running:
                    if not job.future.done():
                        self._release(job)
                        job.future.set_exception(error)

    def _release(self, job: _Job) -> None:
        """Remove a job from the count; called before its future is set, so that its client can submit again at once."""
        with self._lock:
            self._waiting -= len(job.texts)

    def _collect(self, first: _Job) -> tuple[list[_Job], bool]:
        """Collect the jobs of a batch; also returns whether the engine was closed meanwhile."""
        jobs, count = [first], len(first.texts)
        deadline = time.monotonic() + self._batching.timeout_s
        while count < self._batching.max_queries:
            try:
                job = self._jobs.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            jobs.append(job)
            count += len(job.texts)
        return jobs, False

    def _answer(self, jobs: Sequence[_Job]) -> None:
        for side in SIDES:
            same_side = [job for job in jobs if job.side == side]
            texts = [text for job in same_side for text in job.texts]
            vectors, tokens = embed_counted(self.towers, texts, side, self._options)
            starts = np.cumsum([0, *(len(job.texts) for job in same_side)])
            searches: list[tuple[_Job, np.ndarray]] = []
            for job, start in zip(same_side, starts[:-1], strict=True):
                rows = slice(start, start + len(job.texts))
                if job.search is None:
                    counts = self._untruncated(job) if job.untruncated else tokens[rows]
                    self._finish(job, Embeddings(vectors[rows], counts))
                else:
                    searches.append((job, vectors[rows]))
            self._search(searches)
        if self._observe is not None:
            self._observe({side: sum(len(job.texts) for job in jobs if job.side == side) for side in SIDES})

    def _search(self, searches: Sequence[tuple[_Job, np.ndarray]]) -> None:
        # Each job is searched with its own settings: the results of an approximate index may depend on k.
        for settings in {job.search for job, _ in searches if job.search is not None}:
            same = [(job, vectors) for job, vectors in searches if job.search == settings]
            try:
                found = self.index.search_rows(
                    np.concatenate([vectors for _, vectors in same]), settings.k, settings.filter
                )
            except FilterError as error:
                for job, _ in same:
                    self._release(job)
                    job.future.set_exception(error)
                continue
            rows = iter(zip(*found, strict=True))
            for job, _ in same:
                self._finish(job, [Answer("", text, results_of(self.index, *next(rows))) for text in job.texts])

    def _untruncated(self, job: _Job) -> np.ndarray:
        prompt = self.towers.prompt(job.side)
        return self.towers.tokenizer(job.side).untruncated([prompt + text for text in job.texts]).lengths

    def _finish(self, job: _Job, outcome: object) -> None:
        self._release(job)
        job.future.set_result(outcome)


def warm_up(engine: Engine) -> None:
    """Answer one query, so that the first client does not wait for initialization."""
    with contextlib.suppress(Busy, Closed):
        engine.submit(["warm up"], 1).result()
