"""A file whose sha256 is made while it is written, in a thread beside."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

# Less than this is gathered first: a thread is not woken for a few bytes.
AT_ONCE = 2**20


class SummedFile:
    """A new file, as a context manager; `sha256` is that of everything written, once it is closed."""

    def __init__(self, path: Path) -> None:
        self.sha256 = ""
        self._stream = path.open("wb")
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, "sum")
        self._summing: Future[Any] | None = None
        self._gathered = bytearray()

    def __enter__(self) -> SummedFile:
        return self

    def write(self, data: bytes) -> int:
        """Write `data`; returns its length."""
        if len(data) >= AT_ONCE:
            self._put_gathered()
            self._put(data)
        else:
            self._gathered += data
            if len(self._gathered) >= AT_ONCE:
                self._put_gathered()
        return len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream, self._pool:
            if error is None:
                self._put_gathered()
        self.sha256 = self._digest.hexdigest()

    def _put_gathered(self) -> None:
        gathered, self._gathered = self._gathered, bytearray()
        self._put(gathered)

    def _put(self, data: bytes | bytearray) -> None:
        # One piece at a time, so that what waits for being summed takes no memory.
        if self._summing is not None:
            self._summing.result()
        self._summing = self._pool.submit(self._digest.update, data)
        self._stream.write(data)
