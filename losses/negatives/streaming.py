"""Frozen passages in blocks: a tensor on the device or on the host, or the reader of an embedding store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from losses.option_checks.objective import normalized


class FrozenReader(Protocol):
    """What a reader of stored embeddings must have; `EmbeddingStore` of the package index has it."""

    rows: int
    dim: int

    def shards(self) -> Iterator[tuple[int, Any]]:
        """Yield (first row, array [n, dim]) of consecutive rows, in order."""


@dataclass(frozen=True)
class FrozenPassages:
    """Frozen passages [rows, dim]: a tensor or a `FrozenReader`, or the prefixes of theirs.

    Attributes:
        source: The tensor or reader, [rows, width].
        rows: Number of passages.
        dim: Number of columns that are used.
        width: Number of columns of the source if only the first `dim` are used, each row divided by its norm, or None.
    """

    source: Any
    rows: int
    dim: int
    width: int | None = None

    def prefix(self, size: int) -> FrozenPassages:
        """The first `size` columns of each passage, divided by their norm."""
        return FrozenPassages(self.source, self.rows, size, self.dim)

    def on(self, device: torch.device) -> bool:
        """Whether blocks are slices of a tensor on this device, which takes no buffers."""
        return self.width is None and isinstance(self.source, Tensor) and self.source.device == device

    def itemsize(self) -> int:
        """Bytes of a value; those of float32 if the reader does not tell."""
        if isinstance(self.source, Tensor):
            return self.source.element_size()
        return 2 if str(getattr(self.source, "dtype", "")) == "float16" else 4

    def blocks(self, device: torch.device, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, block [n, dim]) with n ≤ size on `device`, in order.

        A block is valid until the next one is asked for. Blocks from the host are copied to a GPU by a stream of its
        own, into one of two buffers, while the previous block is used.

        Raises:
            ValueError: If a reader yields other rows than it announced.
        """
        local = isinstance(self.source, Tensor) and self.source.device == device
        blocks = self._slices(size)
        if device.type == "cuda" and not local:
            blocks = _copied_to(device, blocks, size, self.width or self.dim)
        if self.width is None:
            yield from blocks
            return
        for first, block in blocks:
            wide = torch.promote_types(block.dtype, torch.float32)
            yield first, normalized(block[:, : self.dim].to(wide)).to(block.dtype)

    def _slices(self, size: int) -> Iterator[tuple[int, Tensor]]:
        if isinstance(self.source, Tensor):
            for first in range(0, self.rows, size):
                yield first, self.source[first : first + size]
            return
        done = 0
        for first, shard in self.source.shards():
            width = self.width or self.dim
            if first != done or shard.ndim != 2 or shard.shape[1] != width:
                raise ValueError(
                    f"negatives.frozen must yield rows of {width} values from row {done} on, "
                    f"found shape {list(shard.shape)} at row {first}"
                )
            for start in range(0, len(shard), size):
                # A copy, because memory maps are read-only, which tensors cannot be.
                yield first + start, torch.from_numpy(shard[start : start + size].copy())
            done += len(shard)
        if done != self.rows:
            raise ValueError(f"negatives.frozen announced {self.rows} rows, found {done}")


def _copied_to(
    device: torch.device, slices: Iterator[tuple[int, Tensor]], size: int, dim: int
) -> Iterator[tuple[int, Tensor]]:
    """Copy slices on the host to `device`, one ahead of the consumer."""
    compute, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    # New memory may still be in use by earlier work of the present stream.
    copies.wait_stream(compute)
    buffers: list[Tensor | None] = [None, None]
    pinned: list[Tensor | None] = [None, None]
    copied = [torch.cuda.Event(), torch.cuda.Event()]
    used = [torch.cuda.Event(), torch.cuda.Event()]

    def start(number: int) -> tuple[int, int] | None:
        """Start the copy of the next slice into buffer `number`; returns its first row and length."""
        found = next(slices, None)
        if found is None:
            return None
        first, rows = found
        target = buffers[number]
        if target is None:
            target = buffers[number] = torch.empty(size, dim, dtype=rows.dtype, device=device)
            copies.wait_stream(compute)
        if not rows.is_pinned():
            # Only pinned memory is copied while the host goes on.
            staging = pinned[number]
            if staging is None:
                staging = pinned[number] = torch.empty(size, dim, dtype=rows.dtype, pin_memory=True)
            copied[number].synchronize()
            rows = staging[: len(rows)].copy_(rows)
        copies.wait_event(used[number])
        with torch.cuda.stream(copies):
            target[: len(rows)].copy_(rows, non_blocking=True)
        copied[number].record(copies)
        return first, len(rows)

    number, following = 0, start(0)
    while following is not None:
        first, rows = following
        following = start(1 - number)
        compute.wait_event(copied[number])
        block = buffers[number]
        assert block is not None
        yield first, block[:rows]
        used[number].record(compute)
        number = 1 - number
