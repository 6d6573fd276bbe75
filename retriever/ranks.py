"""Several processes evaluate together (torchrun): who takes part, and one store that all of them embed."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import distributed

from index.embeddings import EmbeddingStore, EmbeddingWriter
from index.files import InputError
from index.passages import Passage
from retriever.encode import WINDOW, EncodeOptions, embed_texts, encode_passages
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

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            distributed.barrier()


class SilentTerminal(Terminal):
    """For all ranks but the first: one of them speaks."""

    def line(self, text: str) -> None:
        """Say nothing."""


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes of this torchrun as one group (gloo: what is exchanged lies in main memory); alone without one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


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
    progress: Callable[[int], None] | None = None,
) -> EmbeddingStore:
    """`encode_passages` by all ranks together: rank r embeds the shards r, r + W, … and rank 0 writes them, in order.

    Every rank calls it with the same arguments and reads the corpus; `out` lies on a disk that all of them see. The
    store has the bytes that one process would write, and is continued after a kill, also by another number of ranks.

    Raises:
        as `encode_passages`; on the other ranks, RuntimeError once rank 0 is gone.
    """
    if ranks.size == 1:
        return encode_passages(
            towers, passages, out, options, source=source, dtype=dtype, shard_rows=shard_rows, progress=progress
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
            embed = _Embed(towers, options)
            for shard, owner in zip(_shards(stream, shard_rows), itertools.cycle(range(ranks.size)), strict=False):
                rows += len(shard)
                if writer is not None:
                    writer.append(shard, embed(shard) if owner == 0 else _received(owner, len(shard), towers.dimension))
                elif owner == ranks.rank:
                    distributed.send(torch.from_numpy(embed(shard)), 0)
                if progress is not None:
                    progress(len(shard))
            if not rows:
                raise InputError(f"{source.get('name', 'corpus')}: expected passages, found none")
    ranks.wait()
    return EmbeddingStore.open(out)


class _Embed:
    """The vectors of a shard's passages, in the windows that `encode_passages` has."""

    def __init__(self, towers: Towers, options: EncodeOptions) -> None:
        self._towers = towers
        self._options = options

    def __call__(self, shard: list[Passage]) -> np.ndarray:
        parts = [shard[start : start + WINDOW] for start in range(0, len(shard), WINDOW)]
        texts = ([passage.content for passage in part] for part in parts)
        return np.concatenate([embed_texts(self._towers, some, "document", self._options) for some in texts])


def _shards(stream: Iterator[Passage], rows: int) -> Iterator[list[Passage]]:
    while shard := list(itertools.islice(stream, rows)):
        yield shard


def _received(rank: int, rows: int, dim: int) -> np.ndarray:
    vectors = torch.empty((rows, dim), dtype=torch.float32)
    distributed.recv(vectors, rank)
    return vectors.numpy()
