"""Adding and deleting passages over HTTP while queries are answered."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from index.ann.edit import add_passages, delete_passages
from index.ann.index import Index
from index.fields.columns import check_kinds
from index.files import InputError
from index.passages import Passage, checked_id, parse_passage
from index.records import Record
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.serve.batching import Engine
from retriever.serve.embeddings import CHUNK
from retriever.serve.errors import JSON, RequestError
from retriever.serve.requests import Limits, parse_object, read_body
from retriever.serve.waiting import engine_result

# Changes that may wait for those before them; further ones are refused.
MAX_WAITING = 16
COLUMNS = ("_id", "id", "title", "text")


class Changes:
    """The handlers of POST /add and POST /delete.

    Changes are made one after another, in a thread of their own: each writes a complete new folder that replaces the
    old one, as `retriever index add` and `delete` do, and is answered when the new index is served. Until then, and if
    it fails, queries are answered from the old one. Use as a context manager: leaving it waits for a change in
    progress and refuses those that wait.

    Args:
        engine: embeds the passages, in batches with the queries.
        index: the index to change, as it is on disk.
        limits: limits of a request.
        served: opens the index on disk if it is another than the one that is served; returns whether it is now.
        log: called with each line of the log.
    """

    def __init__(
        self,
        engine: Engine,
        index: Index,
        limits: Limits,
        served: Callable[[], bool],
        log: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._folder = index.folder
        self._limits = limits
        self._served = served
        self._log = log
        self._waiting: set[Future[int]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="changes")

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    async def add(self, request: Request) -> Response:
        """Handle POST /add: {"passages": [{"_id", "title", "text", and the fields of the index}, …]}."""
        rows = await self._list(request, "passages")
        if self._engine.towers.embeds_images:
            raise RequestError(422, "passages: expected a model of texts, because this one also embeds images")
        index = self._engine.index
        kinds = index.columns.kinds if isinstance(index, Index) and index.columns is not None else {}
        passages = [self._passage(row, kinds, f"passages[{number}]") for number, row in enumerate(rows)]
        seen: set[str] = set()
        for number, passage in enumerate(passages):
            if passage.id in seen:
                raise RequestError(422, f"passages[{number}]: expected another id, found {passage.id!r:.60} again")
            seen.add(passage.id)
        vectors = []
        for start in range(0, len(passages), CHUNK):
            texts = [passage.content for passage in passages[start : start + CHUNK]]
            vectors.append((await engine_result(self._engine.embed, texts, "document")).vectors)
        return await self._answer("added", lambda: self._write(passages, np.concatenate(vectors)))

    async def delete(self, request: Request) -> Response:
        """Handle POST /delete: {"ids": [id, …]}; ids that are not in the index are ignored."""
        try:
            ids = [checked_id(each, "ids") for each in await self._list(request, "ids")]
        except InputError as error:
            raise RequestError(422, str(error)) from None
        return await self._answer("deleted", lambda: delete_passages(self._folder, ids))

    async def _list(self, request: Request, name: str) -> list[Any]:
        """The list that is the body's only member."""
        # A page of another site can make a browser send other types without asking this service first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "expected the header Content-Type: application/json")
        fields = parse_object(await read_body(request, self._limits))
        value = fields.get(name)
        if set(fields) != {name} or not isinstance(value, list) or not 1 <= len(value) <= self._limits.inputs:
            expected = f"expected a JSON object with a list of 1 to {self._limits.inputs} as {name!r}"
            found = ", ".join(map(repr, fields)) or "none"
            if set(fields) == {name} and isinstance(value, list):
                found = f"a list of {len(value)}"
            raise RequestError(422, f"body: {expected}, found {found:.80}")
        return value

    def _passage(self, row: object, kinds: Mapping[str, str], place: str) -> Passage:
        if not isinstance(row, dict):
            raise RequestError(422, f"{place}: expected an object, found {type(row).__name__}")
        # A field "metadata.year" may come in an object "metadata", as in a corpus.
        known = {*COLUMNS, *kinds, *(name.partition(".")[0] for name in kinds)}
        if unknown := [name for name in row if name not in known]:
            expected = f"expected {', '.join(('_id', 'title', 'text', *kinds))}"
            raise RequestError(422, f"{place}: {expected}, found {unknown[0]!r:.60}")
        try:
            passage = parse_passage(Record(place, row), list(kinds))
            check_kinds(passage.fields, kinds, place)
        except InputError as error:
            raise RequestError(422, str(error)) from None
        if len(passage.content) > self._limits.input:
            expected = f"expected at most {self._limits.input} characters"
            raise RequestError(413, f"{place}: {expected}, found {len(passage.content)}")
        return passage

    def _write(self, passages: Sequence[Passage], vectors: np.ndarray) -> int:
        model = self._engine.towers.fingerprint()
        with tempfile.TemporaryDirectory(prefix="retriever-") as temporary:
            folder = Path(temporary) / "new"
            with EmbeddingWriter(folder, dim=vectors.shape[1], model=model, source={"name": "POST /add"}) as store:
                store.append(passages, vectors)
            try:
                return add_passages(self._folder, EmbeddingStore.open(folder))
            except InputError as error:
                raise InputError(str(error).replace(str(folder), "passages")) from None

    async def _answer(self, what: str, change: Callable[[], int]) -> Response:
        """Make a change after those that wait, and answer when it is served."""
        started = time.perf_counter()
        if len(self._waiting) >= MAX_WAITING:
            raise RequestError(429, "too many changes are waiting; try again in a second")
        try:
            future: Future[int] = self._thread.submit(self._make, what, change)
        except RuntimeError:
            raise RequestError(503, "the service is shutting down") from None
        # A count, decreased in the thread of changes, could miss one of two that are changed at once.
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        # Not cancelled with the request: a change that has begun is finished.
        count = await asyncio.shield(asyncio.wrap_future(future))
        milliseconds = round(1000 * (time.perf_counter() - started), 3)
        return JSON({what: count, "passages": self._engine.index.rows, "milliseconds": milliseconds})

    def _make(self, what: str, change: Callable[[], int]) -> int:
        try:
            count = change()
        except InputError as error:
            # Clients do not learn where the files are.
            message = str(error).removeprefix(f"{self._folder}: ").replace(str(self._folder), "the index")
            raise RequestError(409, message) from None
        if not self._served():
            raise RequestError(500, f"{what} on disk, but the old index is still served; see the service's log")
        self._log(f"{what} {count} passages")
        return count
