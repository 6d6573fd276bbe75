"""Vectors on their way to the device: windows of constant size, filled block by block while the last is worked on."""

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

# Vectors held on the device at a time, twice: the larger, the fewer candidates must be scored.
WINDOW_BYTES = {"cpu": 2**28, "cuda": 2**30}
# Memory that a GPU copies from by itself, and the threads that fill it.
STAGE_BYTES = 2**24
STAGES = 4
THREADS = 4
# Pieces copied before they are asked for.
AHEAD = 2

Shards = Iterable[tuple[int, np.ndarray | torch.Tensor]]


class Window:
    """Passages whose vectors are at hand, with their row numbers."""

    def __init__(self, vectors: torch.Tensor, most_rows: int | None = None) -> None:
        """Begin with vectors [n, D]; `join` may bring more, up to `most_rows` (n, if none)."""
        self.parts = [(0, vectors)]
        """Where each part begins, and its vectors [n, D]."""
        self.rows = torch.empty(most_rows or len(vectors), dtype=torch.int64, device=vectors.device)
        self.norm = 0.0
        """At least the largest norm."""
        self._free = threading.Event()
        self._done: Any = None

    @property
    def vectors(self) -> torch.Tensor:
        """Those of its only part."""
        ((_, vectors),) = self.parts
        return vectors

    def join(self, vectors: torch.Tensor) -> int | None:
        """Hold these vectors too; returns where they begin, or none where there is no room for them."""
        begin, last = self.parts[-1]
        start = begin + len(last)
        if start + len(vectors) > len(self.rows) or vectors.dtype != last.dtype:
            return None
        self.parts.append((start, vectors))
        return start

    def enter(self, start: int, first: int, rows: int, norm: float) -> None:
        """The passages `first` to `first + rows` lie from `start` on; their norms are at most `norm`."""
        self.rows[start : start + rows] = torch.arange(first, first + rows, device=self.rows.device)
        self.norm = max(self.norm, norm)

    def release(self) -> None:
        """Nothing more will be asked of what it holds now."""
        self.norm = 0.0
        if self.rows.is_cuda:
            self._done = torch.cuda.current_stream(self.rows.device).record_event()
        self._free.set()

    def wait_until_released(self, stop: threading.Event) -> Any:
        """Wait for `release`, and return the CUDA event of the work that was then under way; `stop` ends the wait."""
        while not self._free.wait(0.1):
            if stop.is_set():
                raise _Stopped
        self._free.clear()
        return self._done


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `first + rows` of all, which lie from `start` on in `window`."""

    window: Window
    start: int
    first: int
    vectors: torch.Tensor
    """[rows, D] of the type they are stored in, float32 or float16."""
    ready: Any = None
    """The CUDA event after which they are there; none when they already are."""

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.vectors)


def pieces(shards: Shards, block_rows: int, most_rows: int, device: torch.device) -> Generator[Piece, None, None]:
    """Cut shards into pieces of at most `block_rows` rows, copied into windows on the device.

    Who takes a piece of another window than before has to release the one before. Tensors that lie on the device
    already are not copied, nor, for a processor, long arrays that nobody can write to, as memory-mapped shards are.
    `most_rows` is the number of rows there are. A shard that is copied is so before the next is read.
    """
    if device.type == "cpu":
        yield from _Filler(HostCopy(device, threading.Event()), block_rows, most_rows).fill(shards)
    else:
        stop = threading.Event()
        yield from ahead(lambda: _Filler(CudaCopy(device, stop), block_rows, most_rows).fill(shards), stop, device)


class _Stopped(Exception):
    """Nobody takes the pieces any more."""


class HostCopy:
    """Copies into windows in main memory."""

    def __init__(self, device: torch.device, stop: threading.Event) -> None:
        self.device = device
        self._stop = stop

    def resident(self, vectors: np.ndarray | torch.Tensor, block_rows: int) -> torch.Tensor | None:
        """The vectors where they lie, if they are on the device and stay as they are."""
        if isinstance(vectors, torch.Tensor):
            return vectors if vectors.device == self.device else None
        # Short ones make windows too short: from window to window candidates have to be scored.
        if self.device.type != "cpu" or vectors.flags.writeable or len(vectors) < block_rows:
            return None
        if vectors.dtype not in (np.float16, np.float32) or not vectors.flags.c_contiguous:
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(vectors)

    def room(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a window."""
        # numpy asks for large pages: to touch the small ones for the first time takes longer than to copy into them.
        return torch.from_numpy(np.empty(shape, np.float16 if dtype == torch.float16 else np.float32))

    def copy(self, target: torch.Tensor, source: np.ndarray) -> None:
        """Begin to copy `source` [n, D] into `target` [n, D]; `source` may be changed afterwards."""
        np.copyto(target.numpy(), source, casting="same_kind")

    def open(self, window: Window) -> None:
        """Get a new window ready for being filled."""

    def reopen(self, window: Window) -> None:
        """Wait until a window that was filled may be filled again."""
        window.wait_until_released(self._stop)

    def ready(self) -> Any:
        """The CUDA event after which all that was copied is there."""
        return None

    def close(self) -> None:
        """Finish what was begun."""


class CudaCopy(HostCopy):
    """Copies into windows on a GPU, through memory that it can read by itself, beside whatever it computes."""

    def __init__(self, device: torch.device, stop: threading.Event) -> None:
        super().__init__(device, stop)
        self._stream = torch.cuda.Stream(device)
        self._pool = ThreadPoolExecutor(THREADS)
        with torch.cuda.device(device):
            self._stages = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(STAGES)]
            self._copied = [torch.cuda.Event() for _ in range(STAGES)]
        self._turn = 0

    def room(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, target: torch.Tensor, source: np.ndarray) -> None:
        bytes_a_row = max(1, target.shape[1] * target.element_size())
        if bytes_a_row > STAGE_BYTES:
            raise ValueError(f"vectors: expected rows of at most {STAGE_BYTES} bytes, found {bytes_a_row}")
        step = STAGE_BYTES // bytes_a_row
        for start in range(0, len(source), step):
            part = source[start : start + step]
            self._turn = (self._turn + 1) % STAGES
            copied = self._copied[self._turn]
            copied.synchronize()
            room = self._stages[self._turn][: len(part) * bytes_a_row]
            stage = room.view(target.dtype).view(len(part), target.shape[1])
            self._copy_in_threads(stage.numpy(), part)
            with torch.cuda.stream(self._stream):
                target[start : start + step].copy_(stage, non_blocking=True)
                copied.record(self._stream)

    def open(self, window: Window) -> None:
        # Its memory may have been another tensor's, which is still being read.
        torch.cuda.synchronize(self.device)

    def reopen(self, window: Window) -> None:
        self._stream.wait_event(window.wait_until_released(self._stop))

    def ready(self) -> Any:
        return self._stream.record_event()

    def close(self) -> None:
        self._pool.shutdown()
        self._stream.synchronize()

    def _copy_in_threads(self, target: np.ndarray, source: np.ndarray) -> None:
        step = -(-len(source) // THREADS)
        cuts = [slice(start, start + step) for start in range(0, len(source), step)]
        for _ in self._pool.map(lambda cut: np.copyto(target[cut], source[cut], casting="same_kind"), cuts):
            pass


class _Filler:
    """Fills windows, two of them in turns."""

    def __init__(self, copy: HostCopy, block_rows: int, most_rows: int) -> None:
        self._copy = copy
        self._block_rows = block_rows
        self._most_rows = most_rows
        self._windows: list[Window] = []
        # Of vectors that are used where they lie.
        self._held: Window | None = None
        # The piece begun: where it begins and ends in the last of the windows, and the row it begins with.
        self._start = self._end = self._first = 0

    def fill(self, shards: Shards) -> Iterator[Piece]:
        """The pieces, in order."""
        try:
            for first, vectors in shards:
                resident = self._copy.resident(vectors, self._block_rows)
                if resident is None:
                    self._held = None
                    yield from self._add(first, np.asarray(vectors))
                else:
                    yield from self._finish()
                    # The window so far is released when a piece of another is taken: nothing more goes into it.
                    self._start = self._end = len(self._windows[-1].vectors) if self._windows else 0
                    yield from self._resident(first, resident)
            yield from self._finish()
        finally:
            self._copy.close()

    def _add(self, row: int, vectors: np.ndarray) -> Iterator[Piece]:
        dtype = torch.float16 if vectors.dtype == np.float16 else torch.float32
        while len(vectors):
            window = self._windows[-1] if self._windows else None
            if window is None or window.vectors.dtype != dtype or self._end == len(window.vectors):
                yield from self._finish()
                window = self._next_window(dtype, vectors.shape[1])
            elif self._first + self._end - self._start != row:
                yield from self._finish()
            if self._start == self._end:
                self._first = row
            count = min(len(vectors), self._block_rows - (self._end - self._start), len(window.vectors) - self._end)
            self._copy.copy(window.vectors[self._end : self._end + count], vectors[:count])
            vectors = vectors[count:]
            row += count
            self._end += count
            if self._end - self._start == self._block_rows:
                yield from self._finish()

    def _finish(self) -> Iterator[Piece]:
        """The piece begun, if there is one."""
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
            room = self._copy.room((self._window_rows(dimension * dtype.itemsize), dimension), dtype)
            self._windows.append(Window(room))
            self._copy.open(self._windows[-1])
        return self._windows[-1]

    def _window_rows(self, bytes_a_row: int) -> int:
        rows = max(self._block_rows, WINDOW_BYTES[self._copy.device.type] // max(1, bytes_a_row))
        return min(rows, self._most_rows)

    def _resident(self, first: int, vectors: torch.Tensor) -> Iterator[Piece]:
        if vectors.dtype == torch.float64:
            vectors = vectors.float()
        begin = None if self._held is None else self._held.join(vectors)
        if self._held is None or begin is None:
            rows = self._window_rows(vectors.shape[1] * vectors.element_size())
            self._held, begin = Window(vectors, max(rows, len(vectors))), 0
        for start in range(0, len(vectors), self._block_rows):
            yield Piece(self._held, begin + start, first + start, vectors[start : start + self._block_rows])


def ahead(fill: Callable[[], Iterator[Piece]], stop: threading.Event, device: torch.device) -> Iterator[Piece]:
    """The pieces, filled by a thread of its own while those before are worked on; it sets `stop` when it ends."""
    taken: queue.Queue[Piece | BaseException | None] = queue.Queue(AHEAD)

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
            except BaseException as error:  # noqa: BLE001 - raised again where the pieces are taken
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
