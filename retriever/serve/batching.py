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
from retriever.encoding.image_encoder import embed_images
from retriever.models.loading.text_settings import SIDES, Side
from retriever.models.modality import embeds_images
from retriever.models.towers import Towers
from retriever.searching.search import Answer, results_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from index.ann.multi_index import MultiIndex
    from retriever.searching.hybrid import HybridIndex, Mode


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
    mode: Mode = "dense"
    """Whether to rank by embeddings, by BM25, or by both."""


@dataclass(frozen=True)
class ImageQuery:
    """A query by an image, or by an image and a text together."""

    image: Image
    """The opened image."""
    text: str = ""


Query = str | ImageQuery


@dataclass(frozen=True)
class _Job:
    texts: Sequence[Query]
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
        observe: called in the engine's thread with the number of texts and images of each batch by side.
        hybrid: the same index with BM25, for the modes "hybrid" and "bm25".

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
        hybrid: HybridIndex | None = None,
    ) -> None:
        self._model = towers.fingerprint()
        self.replace(index, hybrid)
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
    def index(self) -> Index | MultiIndex:
        """The index that is searched."""
        return self._searched[0]

    @property
    def hybrid(self) -> HybridIndex | None:
        """The index with BM25, if there is one."""
        return self._searched[1]

    def replace(self, index: Index | MultiIndex, hybrid: HybridIndex | None = None) -> None:
        """Search another index from the next batch on.

        Raises:
            InputError: the index was made with another model.
        """
        index.check_model(self._model)
        # One assignment, because the engine's thread reads both.
        self._searched = index, hybrid

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

    def submit(
        self, queries: Sequence[Query], k: int, filter: Filter | None = None, mode: Mode = "dense"
    ) -> Future[list[Answer]]:
        """Queue queries.

        Args:
            queries: texts, and images if the model embeds them.
            k: results per query.
            filter: only passages that match. Default: None, all.
            mode: "dense", "hybrid" or "bm25"; the latter two need `hybrid`, and queries that have a text. Default:
                "dense".

        Returns:
            A future of the answers, in the order of the queries, with at most `k` results each.

        Raises:
            Busy: too many queries are waiting.
            Closed: the engine was closed.
        """
        return self._put(_Job(queries, "query", SearchSettings(k, filter, mode)))

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
            queries = [query for job in same_side for query in job.texts]
            vectors, tokens = self._embed(queries, side)
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

    def _embed(self, queries: Sequence[Query], side: Side) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of texts and images [n, D], and the tokens of the texts [n].

        The embedding of an image with a text is the mean of both, at unit length: they are in one space.
        """
        texts = [text_of(query) for query in queries]
        images = {row: query.image for row, query in enumerate(queries) if isinstance(query, ImageQuery)}
        with_text = [row for row, text in enumerate(texts) if text or row not in images]
        vectors = np.zeros((len(queries), self.towers.dimension), dtype=np.float32)
        tokens = np.zeros(len(queries), dtype=np.int64)
        vectors[with_text], tokens[with_text] = embed_counted(
            self.towers, [texts[row] for row in with_text], side, self._options
        )
        if images and embeds_images(self.towers):
            rows = list(images)
            vectors[rows] += embed_images(self.towers, list(images.values()), self._options)
            norms = np.linalg.norm(vectors[rows], axis=1, keepdims=True)
            vectors[rows] /= np.where(norms > 0, norms, 1)
        return vectors, tokens

    def _search(self, searches: Sequence[tuple[_Job, np.ndarray]]) -> None:
        index, hybrid = self._searched
        # Each job is searched with its own settings: the results of an approximate index may depend on k.
        for settings in {job.search for job, _ in searches if job.search is not None}:
            same = [(job, vectors) for job, vectors in searches if job.search == settings]
            vectors = np.concatenate([each for _, each in same])
            try:
                if settings.mode == "dense" or hybrid is None:
                    found = index.search_rows(vectors, settings.k, settings.filter)
                else:
                    texts = [text_of(query) for job, _ in same for query in job.texts]
                    found = hybrid.search_rows(texts, vectors, settings.k, settings.filter, settings.mode)
            except FilterError as error:
                for job, _ in same:
                    self._release(job)
                    job.future.set_exception(error)
                continue
            rows = iter(zip(*found, strict=True))
            for job, _ in same:
                self._finish(job, [Answer("", text_of(query), results_of(index, *next(rows))) for query in job.texts])

    def _untruncated(self, job: _Job) -> np.ndarray:
        prompt = self.towers.prompt(job.side)
        texts = [prompt + text_of(query) for query in job.texts]
        return self.towers.tokenizer(job.side).untruncated(texts).lengths

    def _finish(self, job: _Job, outcome: object) -> None:
        self._release(job)
        job.future.set_result(outcome)


def text_of(query: Query) -> str:
    """The text of a query; "" if it is only an image."""
    return query.text if isinstance(query, ImageQuery) else query


def warm_up(engine: Engine) -> None:
    """Answer one query, so that the first client does not wait for initialization."""
    with contextlib.suppress(Busy, Closed):
        engine.submit(["warm up"], 1).result()
