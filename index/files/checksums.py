"""Checksums: the sha256 of files, and of a file while it is written."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

# Files hashed at the same time, and bytes read at once from each.
HASH_THREADS = 4
HASH_BLOCK_BYTES = 2**19
# Smaller writes are buffered up to this many bytes, so that the thread is not woken for each of them.
BUFFER_BYTES = 2**20


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hexadecimal sha256 of a file, in constant memory. `progress` is called with the number of bytes just read."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(HASH_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path], progress: Callable[[int], None] | None = None) -> Generator[str, None, None]:
    """`sha256_file` of each path, in order.

    Files are read in parallel, because one core hashes slower than a disk reads. `progress` is called from several
    threads, one at a time.
    """
    lock = threading.Lock()

    def locked(count: int) -> None:
        assert progress is not None
        with lock:
            progress(count)

    sum_of = partial(sha256_file, progress=None if progress is None else locked)
    if len(paths) < 2:
        yield from map(sum_of, paths)
        return
    with ThreadPoolExecutor(min(len(paths), HASH_THREADS, os.cpu_count() or 1)) as pool:
        try:
            yield from pool.map(sum_of, paths)
        finally:
            pool.shutdown(cancel_futures=True)


class HashingFile:
    """A new file, as a context manager, hashed in a background thread while it is written.

    After it is closed, `sha256` is that of what was written, in hex.
    """

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
