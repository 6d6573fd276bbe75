"""Moving vectors to the device: two windows of constant size, one filled while the other is searched."""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Size of a window, of which there are two. Larger windows leave fewer candidates to score.
WINDOW_BYTES = {"cpu": 2**28, "cuda": 2**30}
# Pinned staging buffers for copies to a GPU, and the threads that fill them.
STAGING_BYTES = 2**24
STAGING_BUFFERS = 4
COPY_THREADS = 4
# Pieces copied to the device ahead of the search.
PREFETCHED_PIECES = 2

Shards = Iterable[tuple[int, np.ndarray | torch.Tensor]]


class Window:
    """Passage vectors on the device, with their row numbers."""

    def __init__(self, vectors: torch.Tensor, capacity: int | None = None) -> None:
        """Start with `vectors` [n, D]; `append` may add more, up to `capacity` rows (default n)."""
        self.parts = [(0, vectors)]
        """Where each part begins, and its vectors [n, D]."""
        self.rows = torch.empty(capacity or len(vectors), dtype=torch.int64, device=vectors.device)
        self.norm = 0.0
        """At least the largest norm."""
        self._free = threading.Event()
        self._done: Any = None

    @property
    def vectors(self) -> torch.Tensor:
        """The vectors of its only part."""
        ((_, vectors),) = self.parts
        return vectors

    def append(self, vectors: torch.Tensor) -> int | None:
        """Append vectors without copying them; return the position of the first, or None if the window is full."""
        begin, last = self.parts[-1]
        start = begin + len(last)
        if start + len(vectors) > len(self.rows) or vectors.dtype != last.dtype:
            return None
        self.parts.append((start, vectors))
        return start

    def set_rows(self, start: int, first: int, rows: int, norm: float) -> None:
        """Record that the passages `first` to `first + rows` are at `start`, with norms of at most `norm`."""
        self.rows[start : start + rows] = torch.arange(first, first + rows, device=self.rows.device)
        self.norm = max(self.norm, norm)

    def release(self) -> None:
        """Mark the window as no longer in use, so that it may be filled again."""
        self.norm = 0.0
        if self.rows.is_cuda:
            self._done = torch.cuda.current_stream(self.rows.device).record_event()
        self._free.set()

    def wait_until_released(self, stop: threading.Event) -> Any:
        """Wait for `release`; return the CUDA event that ends the work on this window. Setting `stop` ends the wait."""
        while not self._free.wait(0.1):
            if stop.is_set():
                raise _Stopped
        self._free.clear()
        return self._done


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `first + rows`, at position `start` in `window`."""

    window: Window
    start: int
    first: int
    vectors: torch.Tensor
    """[rows, D] float32 or float16, as stored."""
    ready: Any = None
    """CUDA event that ends the copy; None if the vectors are already there."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.vectors)


def pieces(shards: Shards, block_rows: int, total_rows: int, device: torch.device) -> Generator[Piece, None, None]:
    """Split shards into pieces of at most `block_rows` rows, copied into windows on the device.

    When a piece belongs to another window than the one before, the caller must release the former window. Tensors on
    the device are used in place, as are long read-only arrays on a CPU (memory-mapped shards). Each other shard is
    copied completely before the next is read.

    Args:
        shards: (first row, vectors [n, D]).
        block_rows: maximum rows of a piece.
        total_rows: total number of rows.
        device: where the windows are.
    """
    if device.type == "cpu":
        yield from _WindowFiller(HostCopy(device, threading.Event()), block_rows, total_rows).fill(shards)
    else:
        stop = threading.Event()
        yield from prefetch(
            lambda: _WindowFiller(CudaCopy(device, stop), block_rows, total_rows).fill(shards), stop, device
        )


class _Stopped(Exception):
    """The consumer has stopped."""


class HostCopy:
    """Copies vectors into windows in main memory."""

    def __init__(self, device: torch.device, stop: threading.Event) -> None:
        self.device = device
        self._stop = stop

    def usable_in_place(self, vectors: np.ndarray | torch.Tensor, block_rows: int) -> torch.Tensor | None:
        """The vectors as a tensor without a copy, if they are on the device and will not change; else None."""
        if isinstance(vectors, torch.Tensor):
            return vectors if vectors.device == self.device else None
        # Short arrays make short windows, and candidates must be scored at the end of each window.
        if self.device.type != "cpu" or vectors.flags.writeable or len(vectors) < block_rows:
            return None
        if vectors.dtype not in (np.float16, np.float32) or not vectors.flags.c_contiguous:
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(vectors)

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate a window."""
        # numpy uses huge pages; the page faults of small ones take longer than the copy.
        return torch.from_numpy(np.empty(shape, np.float16 if dtype == torch.float16 else np.float32))

    def copy(self, target: torch.Tensor, source: np.ndarray) -> None:
        """Start to copy `source` [n, D] into `target` [n, D]; `source` may be changed after the call."""
        np.copyto(target.numpy(), source, casting="same_kind")

    def open(self, window: Window) -> None:
        """Prepare a new window."""

    def reopen(self, window: Window) -> None:
        """Wait until a used window may be filled again."""
        window.wait_until_released(self._stop)

    def ready(self) -> Any:
        """CUDA event that ends all copies so far; None on a CPU."""
        return None

    def close(self) -> None:
        """Finish pending copies."""


class CudaCopy(HostCopy):
    """Copies vectors into windows on a GPU through pinned memory, on a stream of its own."""

    def __init__(self, device: torch.device, stop: threading.Event) -> None:
        super().__init__(device, stop)
        self._stream = torch.cuda.Stream(device)
        self._pool = ThreadPoolExecutor(COPY_THREADS)
        with torch.cuda.device(device):
            self._staging = [
                torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(STAGING_BUFFERS)
            ]
            self._copied = [torch.cuda.Event() for _ in range(STAGING_BUFFERS)]
        self._next_buffer = 0

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, target: torch.Tensor, source: np.ndarray) -> None:
        row_bytes = max(1, target.shape[1] * target.element_size())
        if row_bytes > STAGING_BYTES:
            raise ValueError(f"vectors: expected rows of at most {STAGING_BYTES} bytes, found {row_bytes}")
        step = STAGING_BYTES // row_bytes
        for start in range(0, len(source), step):
            part = source[start : start + step]
            self._next_buffer = (self._next_buffer + 1) % STAGING_BUFFERS
            copied = self._copied[self._next_buffer]
            copied.synchronize()
            staging = self._staging[self._next_buffer][: len(part) * row_bytes]
            stage = staging.view(target.dtype).view(len(part), target.shape[1])
            self._copy_in_threads(stage.numpy(), part)
            with torch.cuda.stream(self._stream):
                target[start : start + step].copy_(stage, non_blocking=True)
                copied.record(self._stream)

    def open(self, window: Window) -> None:
        # The allocator may have reused memory that a running kernel still reads.
        torch.cuda.synchronize(self.device)

    def reopen(self, window: Window) -> None:
        self._stream.wait_event(window.wait_until_released(self._stop))

    def ready(self) -> Any:
        return self._stream.record_event()

    def close(self) -> None:
        self._pool.shutdown()
        self._stream.synchronize()

    def _copy_in_threads(self, target: np.ndarray, source: np.ndarray) -> None:
        step = -(-len(source) // COPY_THREADS)
        cuts = [slice(start, start + step) for start in range(0, len(source), step)]
        for _ in self._pool.map(lambda cut: np.copyto(target[cut], source[cut], casting="same_kind"), cuts):
            pass


class _WindowFiller:
    """Fills two windows alternately."""

    def __init__(self, copy: HostCopy, block_rows: int, total_rows: int) -> None:
        self._copy = copy
        self._block_rows = block_rows
        self._total_rows = total_rows
        self._windows: list[Window] = []
        # Window of vectors that are used in place.
        self._resident_window: Window | None = None
        # The current piece: its start and end in the last window, and its first row.
        self._start = self._end = self._first = 0

    def fill(self, shards: Shards) -> Iterator[Piece]:
        """Yield the pieces in order."""
        try:
            for first, vectors in shards:
                in_place = self._copy.usable_in_place(vectors, self._block_rows)
                if in_place is None:
                    self._resident_window = None
                    yield from self._add(first, np.asarray(vectors))
                else:
                    yield from self._end_piece()
                    # The consumer releases the current window when it gets a piece of another: add nothing more to it.
                    self._start = self._end = len(self._windows[-1].vectors) if self._windows else 0
                    yield from self._use_in_place(first, in_place)
            yield from self._end_piece()
        finally:
            self._copy.close()

    def _add(self, row: int, vectors: np.ndarray) -> Iterator[Piece]:
        dtype = torch.float16 if vectors.dtype == np.float16 else torch.float32
        while len(vectors):
            window = self._windows[-1] if self._windows else None
            if window is None or window.vectors.dtype != dtype or self._end == len(window.vectors):
                yield from self._end_piece()
                window = self._next_window(dtype, vectors.shape[1])
            elif self._first + self._end - self._start != row:
                yield from self._end_piece()
            if self._start == self._end:
                self._first = row
            count = min(len(vectors), self._block_rows - (self._end - self._start), len(window.vectors) - self._end)
            self._copy.copy(window.vectors[self._end : self._end + count], vectors[:count])
            vectors = vectors[count:]
            row += count
            self._end += count
            if self._end - self._start == self._block_rows:
                yield from self._end_piece()

    def _end_piece(self) -> Iterator[Piece]:
        """Yield the current piece, if it is not empty."""
        if self._end > self._start:
            window = self._windows[-1]
            yield Piece(window, self._start, self._first, window.vectors[self._start : self._end], self._copy.ready())
            self._start = self._end

    def _next_window(self, dtype: torch.dtype, dimension: int) -> Window:
        self._start = self._end = 0
        if self._windows and self._windows[-1].vectors.dtype != dtype:
            self._windows = []
        if len(self._windows) == 2:
            self._windows.reverse()
            self._copy.reopen(self._windows[-1])
        else:
            vectors = self._copy.allocate((self._window_rows(dimension * dtype.itemsize), dimension), dtype)
            self._windows.append(Window(vectors))
            self._copy.open(self._windows[-1])
        return self._windows[-1]

    def _window_rows(self, row_bytes: int) -> int:
        rows = max(self._block_rows, WINDOW_BYTES[self._copy.device.type] // max(1, row_bytes))
        return min(rows, self._total_rows)

    def _use_in_place(self, first: int, vectors: torch.Tensor) -> Iterator[Piece]:
        if vectors.dtype == torch.float64:
            vectors = vectors.float()
        begin = None if self._resident_window is None else self._resident_window.append(vectors)
        if self._resident_window is None or begin is None:
            rows = self._window_rows(vectors.shape[1] * vectors.element_size())
            self._resident_window, begin = Window(vectors, max(rows, len(vectors))), 0
        for start in range(0, len(vectors), self._block_rows):
            yield Piece(self._resident_window, begin + start, first + start, vectors[start : start + self._block_rows])


def prefetch(fill: Callable[[], Iterator[Piece]], stop: threading.Event, device: torch.device) -> Iterator[Piece]:
    """Run `fill` in a thread and yield its pieces; the queue is bounded. Sets `stop` at the end."""
    taken: queue.Queue[Piece | BaseException | None] = queue.Queue(PREFETCHED_PIECES)

    def put(item: Piece | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return taken.put(item, timeout=0.1)
        raise _Stopped

    def work() -> None:
        with contextlib.suppress(_Stopped):
            try:
                for piece in fill():
                    put(piece)
            except _Stopped:
                raise
            except BaseException as error:  # noqa: BLE001 - raised again in the consumer
                put(error)
            put(None)

    thread = threading.Thread(target=work, name="vectors", daemon=True)
    thread.start()
    try:
        while (item := taken.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item.ready is not None:
                torch.cuda.current_stream(device).wait_event(item.ready)
            yield item
    finally:
        stop.set()
        thread.join()
