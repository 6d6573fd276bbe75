"""Batching of concurrent queries: one thread runs the model and the index."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from index.ann.index import Index
from retriever.encoding.encoder import EncodeOptions, embed_texts
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
class _Job:
    queries: Sequence[str]
    k: int
    future: Future[list[Answer]] = field(default_factory=Future)


class Engine:
    """Answers queries in batches, in a thread of its own. Use as a context manager, or call `close`.

    Args:
        towers: the model that embedded the passages of the index, in evaluation mode.
        index: one index, or several searched as one.
        options: precision and micro-batch size.
        batching: limits of a batch and of the queue.

    Raises:
        InputError: the index was made with another model.
    """

    def __init__(self, towers: Towers, index: Index | MultiIndex, options: EncodeOptions, batching: Batching) -> None:
        index.check_model(towers.fingerprint())
        self.index = index
        self._towers = towers
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
        """Number of accepted queries that are not answered yet."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """Whether the engine accepts queries."""
        return self._thread.is_alive() and not self._closed

    def submit(self, queries: Sequence[str], k: int) -> Future[list[Answer]]:
        """Queue queries.

        Returns:
            A future of the answers, in the order of the queries, with at most `k` results each.

        Raises:
            Busy: too many queries are waiting.
            Closed: the engine was closed.
        """
        job = _Job(queries, k)
        with self._lock:
            if self._closed:
                raise Closed
            if self._waiting + len(queries) > self._batching.max_waiting:
                raise Busy
            self._waiting += len(queries)
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
            self._waiting -= len(job.queries)

    def _collect(self, first: _Job) -> tuple[list[_Job], bool]:
        """Collect the jobs of a batch; also returns whether the engine was closed meanwhile."""
        jobs, count = [first], len(first.queries)
        deadline = time.monotonic() + self._batching.timeout_s
        while count < self._batching.max_queries:
            try:
                job = self._jobs.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            jobs.append(job)
            count += len(job.queries)
        return jobs, False

    def _answer(self, jobs: Sequence[_Job]) -> None:
        texts = [text for job in jobs for text in job.queries]
        vectors = embed_texts(self._towers, texts, "query", self._options)
        starts = np.cumsum([0, *(len(job.queries) for job in jobs)])
        # Each job is searched with its own k: the results of an approximate index may depend on k.
        for k in {job.k for job in jobs}:
            same_k = [(job, start) for job, start in zip(jobs, starts[:-1], strict=True) if job.k == k]
            positions = np.concatenate([np.arange(start, start + len(job.queries)) for job, start in same_k])
            found = iter(zip(*self.index.search_rows(vectors[positions], k), strict=True))
            for job, _ in same_k:
                answers = [Answer("", text, results_of(self.index, *next(found))) for text in job.queries]
                self._release(job)
                job.future.set_result(answers)


def warm_up(engine: Engine) -> None:
    """Answer one query, so that the first client does not wait for initialization."""
    with contextlib.suppress(Busy, Closed):
        engine.submit(["warm up"], 1).result()
