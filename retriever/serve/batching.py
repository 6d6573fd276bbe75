"""One thread that owns the model and the index; queries that come at about the same time pass through together."""

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
from retriever.searching.search import Answer, Result

if TYPE_CHECKING:
    from index.ann.multi_index import MultiIndex


class Busy(Exception):
    """So many queries are waiting that another would wait too long."""


class Closed(Exception):
    """No queries are taken any more."""


@dataclass(frozen=True)
class Batching:
    """How queries are brought together."""

    most: int = 32
    """Queries embedded at once; 1 takes each by itself."""
    window: float = 0.003
    """Seconds that the first query of a batch waits for others."""
    waiting: int = 512
    """Queries that may wait; more are refused."""


@dataclass(frozen=True)
class _Job:
    queries: Sequence[str]
    k: int
    future: Future[list[Answer]] = field(default_factory=Future)


class Engine:
    """Answers queries in batches. Use as a context manager, or call `close`.

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
        """Queries taken and not yet answered."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """Whether queries are answered."""
        return self._thread.is_alive() and not self._closed

    def submit(self, queries: Sequence[str], k: int) -> Future[list[Answer]]:
        """The answers to some queries, in their order, once they are there; each has at most `k` results.

        Raises:
            Busy: too many are waiting.
            Closed: the engine was closed.
        """
        job = _Job(queries, k)
        with self._lock:
            if self._closed:
                raise Closed
            if self._waiting + len(queries) > self._batching.waiting:
                raise Busy
            self._waiting += len(queries)
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Answer what was taken, take nothing more, and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            job = self._jobs.get()
            if job is None:
                return
            jobs, ended = self._others(job)
            # A job whose client has gone is left out.
            wanted = []
            for job in jobs:
                if job.future.set_running_or_notify_cancel():
                    wanted.append(job)
                else:
                    self._waits_no_more(job)
            try:
                self._answer(wanted)
            except Exception as error:  # noqa: BLE001 - each client gets it, and the next batch is answered
                for job in wanted:
                    if not job.future.done():
                        self._waits_no_more(job)
                        job.future.set_exception(error)

    def _waits_no_more(self, job: _Job) -> None:
        """Before its client is told: who asks again at once must find room for as much."""
        with self._lock:
            self._waiting -= len(job.queries)

    def _others(self, first: _Job) -> tuple[list[_Job], bool]:
        """The jobs that pass through together with the first, and whether the engine was closed meanwhile."""
        jobs, count = [first], len(first.queries)
        until = time.monotonic() + self._batching.window
        while count < self._batching.most:
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
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
        # An approximate index looks further for a larger k: each job gets what it would get alone.
        for k in {job.k for job in jobs}:
            alike = [(job, start) for job, start in zip(jobs, starts[:-1], strict=True) if job.k == k]
            rows = np.concatenate([np.arange(start, start + len(job.queries)) for job, start in alike])
            found = iter(zip(*self.index.search_rows(vectors[rows], k), strict=True))
            for job, _ in alike:
                answers = [self._ranked(text, *next(found)) for text in job.queries]
                self._waits_no_more(job)
                job.future.set_result(answers)

    def _ranked(self, query: str, scores: np.ndarray, rows: np.ndarray) -> Answer:
        results: list[Result] = []
        for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
            if row >= 0:
                passage = self.index.passage(row)
                results.append(Result(len(results) + 1, score, passage.id, passage.title, passage.text))
        return Answer("", query, results)


def warm_up(engine: Engine) -> None:
    """Answer one query, so that the first visitor does not wait for what happens only once."""
    with contextlib.suppress(Busy, Closed):
        engine.submit(["warm up"], 1).result()
