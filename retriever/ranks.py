"""Several processes train or evaluate together (torchrun): who takes part, what they tell each other, shared stores."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import distributed

from index.embeddings import EmbeddingStore, EmbeddingWriter
from index.files import InputError
from index.passages import Passage
from retriever.ahead import ahead, giving_way
from retriever.corpus_windows import WINDOW, Cut, WindowMaker, oddities
from retriever.data.schedule import Share
from retriever.encode import EncodeOptions, embed_windows, encode_passages, window_maker
from retriever.first_error import first_error_shown
from retriever.progress import Terminal
from retriever.towers import Towers

# One rank may build an index while the others wait; a rank that dies is noticed by torchrun, not by the clock.
PATIENCE = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and answers."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """The process group of all, for a loss over them; none for one process alone."""
        return distributed.group.WORLD if self.size > 1 else None

    @property
    def share(self) -> Share:
        """This process's part of a batch."""
        return Share(self.rank, self.size)

    def wait(self) -> None:
        """Until all have come here."""
        # A barrier of several backends would pass through the GPUs, behind all that they have to do.
        self.totals(0)

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first rank passes through the body, then all others: what it writes to the disk, they find there."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank."""
        return self.most(float(here)) > 0

    def most(self, here: float) -> float:
        """The largest of all ranks' numbers."""
        return self._reduced([here], distributed.ReduceOp.MAX)[0]

    def totals(self, *here: float) -> list[float]:
        """The sums over ranks."""
        return self._reduced(list(here), distributed.ReduceOp.SUM)

    def told(self, here: Any) -> Any:
        """What the first rank has, on all of them: numbers, texts, lists and dictionaries of them."""
        if self.size == 1:
            return here
        content = json.dumps(here).encode() if self.first else b""
        length = int(self.totals(len(content))[0])
        buffer = torch.empty(length, dtype=torch.uint8)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        distributed.broadcast(buffer, 0)
        return json.loads(buffer.numpy().tobytes())

    def gathered(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows [n] of every rank, whose numbers may differ, in order."""
        if self.size == 1:
            return [rows]
        counts = [int(count) for count in self.totals(*np.eye(self.size)[self.rank] * len(rows))]
        padded = np.zeros(max(counts), dtype=rows.dtype)
        padded[: len(rows)] = rows
        found = [torch.empty(max(counts), dtype=torch.from_numpy(padded).dtype) for _ in counts]
        distributed.all_gather(found, torch.from_numpy(padded))
        return [part.numpy()[:count] for part, count in zip(found, counts, strict=True)]

    def _reduced(self, numbers: list[float], how: Any) -> list[float]:
        if self.size == 1:
            return numbers
        # In main memory, where nobody waits for a device.
        exchanged = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(exchanged, how)
        return exchanged.tolist()


@dataclass(frozen=True)
class PlannedRanks(Ranks):
    """The first of so many processes, the others of which are not there: to plan a run, not to make one."""

    @property
    def group(self) -> Any:
        """None: nobody to exchange with."""
        return None

    def wait(self) -> None:
        """For nobody."""


class SilentTerminal(Terminal):
    """For all ranks but the first: one of them speaks."""

    def line(self, text: str) -> None:
        """Say nothing."""


def process_count() -> int:
    """How many processes this torchrun started, on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined_ranks(*, on_devices: bool = False) -> Iterator[Ranks]:
    """The processes of this torchrun as one group; alone without one.

    What lies in main memory is exchanged by gloo; with `on_devices` what lies on GPUs by NCCL. The first error of any
    ends all (first_error.py).
    """
    if process_count() == 1:
        yield Ranks()
        return
    store, rank, size = next(iter(distributed.rendezvous("env://")))
    # torchrun's store outlives an attempt that failed, with the addresses of its processes in it.
    store = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if on_devices else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    with first_error_shown(store):
        yield Ranks(rank, size)
        # After an error others may never come to this.
        distributed.destroy_process_group()


def uses_gpus(device: str) -> bool:
    """Whether a process that is asked for that device, "auto" perhaps, will compute on a GPU."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def own_device(device: torch.device) -> torch.device:
    """`cuda` as the GPU of this process's number on its machine."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def encode_on_ranks(
    ranks: Ranks,
    towers: Towers,
    passages: Iterable[Passage],
    out: Path,
    options: EncodeOptions,
    *,
    source: dict[str, str],
    dtype: Literal["float32", "float16"] = "float32",
    shard_rows: int = 65536,
    window: int = WINDOW,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
    notice: Callable[[str, str], None] | None = None,
) -> EmbeddingStore:
    """`encode_passages` by all ranks together: rank r embeds the shards r, r + W, … and rank 0 writes them, in order.

    Every rank calls it with the same arguments and reads the corpus; `out` lies on a disk that all of them see. The
    store has the bytes that one process would write, and is continued after a kill, also by another number of ranks.
    `workers` are for one rank alone; several read and tokenize in threads.

    Raises:
        as `encode_passages`; on the other ranks, RuntimeError once rank 0 is gone.
    """
    if ranks.size == 1:
        return encode_passages(
            towers,
            passages,
            out,
            options,
            source=source,
            dtype=dtype,
            shard_rows=shard_rows,
            window=window,
            workers=workers,
            progress=progress,
            notice=notice,
        )
    begun = torch.zeros(2, dtype=torch.int64)
    with contextlib.ExitStack() as held:
        writer = None
        if ranks.first:
            writer = held.enter_context(
                EmbeddingWriter(
                    out,
                    dim=towers.dimension,
                    dtype=dtype,
                    model=towers.fingerprint(),
                    source={**source, "precision": options.precision},
                    shard_rows=shard_rows,
                )
            )
            begun += torch.tensor([writer.rows, writer.complete])
        distributed.broadcast(begun, 0)
        rows, complete = begun.tolist()
        if not complete:
            stream = iter(passages)
            skipped = sum(1 for _ in itertools.islice(stream, rows))
            if progress is not None and skipped:
                progress(skipped)
            cut = Cut(shard_rows, window, towers.dimension)
            embed = _Embed(towers, options, cut, window_maker(towers, out))
            for shard, owner in zip(_shards(stream, shard_rows), itertools.cycle(range(ranks.size)), strict=False):
                if writer is not None:
                    here = owner == 0
                    writer.append(shard, embed(shard, rows) if here else _received(owner, len(shard), towers.dimension))
                elif owner == ranks.rank:
                    distributed.send(torch.from_numpy(embed(shard, rows)), 0)
                rows += len(shard)
                if notice is not None:
                    for what, where in ((what, passage.id) for passage in shard for what in oddities(passage)):
                        notice(what, where)
                if progress is not None:
                    progress(len(shard))
            if not rows:
                raise InputError(f"{source.get('name', 'corpus')}: expected passages, found none")
    ranks.wait()
    return EmbeddingStore.open(out)


class _Embed:
    """The vectors of a shard's passages, in the windows that `encode_passages` has."""

    def __init__(self, towers: Towers, options: EncodeOptions, cut: Cut, maker: WindowMaker) -> None:
        self._towers, self._options = towers, options
        self._cut, self._maker = cut, maker

    def __call__(self, shard: list[Passage], row: int) -> np.ndarray:
        """Of the shard that begins at the row `row`."""
        windows = ((None, self._maker.tokens(some)) for _, some in self._cut(iter(shard), row))
        with giving_way(), contextlib.closing(ahead(windows)) as tokenized:
            embedded = embed_windows(self._towers, tokenized, "document", self._options)
            return np.concatenate([vectors for _, vectors in embedded])


def _shards(stream: Iterator[Passage], rows: int) -> Iterator[list[Passage]]:
    while shard := list(itertools.islice(stream, rows)):
        yield shard


def _received(rank: int, rows: int, dim: int) -> np.ndarray:
    vectors = torch.empty((rows, dim), dtype=torch.float32)
    distributed.recv(vectors, rank)
    return vectors.numpy()
