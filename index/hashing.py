"""A file whose sha256 is computed in a background thread while it is written."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

# Smaller writes are buffered up to this many bytes, so that the thread is not woken for each of them.
BUFFER_BYTES = 2**20


class HashingFile:
    """A new file, as a context manager. After it is closed, `sha256` is that of what was written, in hex."""

    def __init__(self, path: Path) -> None:
        self.sha256 = ""
        self._stream = path.open("wb")
        self._digest = hashlib.sha256()
        self._executor = ThreadPoolExecutor(1, "sha256")
        self._pending: Future[Any] | None = None
        self._buffer = bytearray()

    def __enter__(self) -> HashingFile:
        return self

    def write(self, data: bytes) -> int:
        """Write `data`; return its length in bytes."""
        if len(data) >= BUFFER_BYTES:
            self._flush()
            self._hash_and_write(data)
        else:
            self._buffer += data
            if len(self._buffer) >= BUFFER_BYTES:
                self._flush()
        return len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream, self._executor:
            if error is None:
                self._flush()
        self.sha256 = self._digest.hexdigest()

    def _flush(self) -> None:
        buffered, self._buffer = self._buffer, bytearray()
        self._hash_and_write(buffered)

    def _hash_and_write(self, data: bytes | bytearray) -> None:
        # One block at a time is hashed, so that no blocks queue up in memory.
        if self._pending is not None:
            self._pending.result()
        self._pending = self._executor.submit(self._digest.update, data)
        self._stream.write(data)
