"""Vectors of an embedding store by row, for the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from index.progress import Reporter
from index.store.reader import EmbeddingStore
from retriever.data.false_negatives import Integers
from retriever.utils.check_progress import checksum_progress
from retriever.utils.device import Precision, to_device

# Share of the free memory that frozen passages may take by default.
FREE_SHARE = 0.5


def open_verified(folder: str, reporter: Reporter) -> EmbeddingStore:
    """Open an embedding store and verify the checksums of all its files.

    Raises:
        InputError: There is no store, or it is incomplete or damaged.
    """
    store = EmbeddingStore.open(folder)
    with checksum_progress(reporter, [Path(folder)]) as checked:
        store.check(checked)
    return store


class StoredVectors:
    """Rows of the vectors of a store, through memory maps."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self._shards = [vectors for _, vectors in store.shards()]

    def rows(self, rows: Integers, device: torch.device) -> Tensor:
        """The vectors [n, D] of some rows [n] on a device, float32, in the order of `rows`."""
        vectors = np.empty((len(rows), self.store.dim), np.float32)
        shard_of, row_of = np.divmod(rows, self.store.shard_rows)
        for number in np.unique(shard_of):
            chosen = np.flatnonzero(shard_of == number)
            vectors[chosen] = self._shards[number][row_of[chosen]]
        return to_device(torch.from_numpy(vectors), device)


class FrozenCorpus:
    """The passages of `query_only`: negatives of every query, without gradients.

    Args:
        store: The embedding store, verified.
        location: "device", "host" or "disk", where they are during training, or "auto", the first with enough memory.
        device: Device of the loss.
        precision: Precision of the towers. With "bf16", the vectors are kept in bf16.
    """

    def __init__(self, store: EmbeddingStore, location: str, device: torch.device, precision: Precision) -> None:
        self._vectors = StoredVectors(store)
        dtype = _frozen_dtype(store, device, precision)
        size = store.rows * store.dim * dtype.itemsize
        self.location = _choose_location(location, size, device)
        self.passages: Tensor | EmbeddingStore = store
        """For `losses.Negatives.frozen`."""
        if self.location != "disk":
            where = device if self.location == "device" else torch.device("cpu")
            pinned = where.type == "cpu" and device.type == "cuda"
            self.passages = torch.empty(store.rows, store.dim, dtype=dtype, device=where, pin_memory=pinned)
            for first, shard in store.shards():
                self.passages[first : first + len(shard)].copy_(torch.from_numpy(np.array(shard)))
        self.device_bytes = size if self.location == "device" else 0
        """Bytes on the device."""
        self.host_bytes = size if self.location == "host" else 0
        """Bytes in host memory, if that is not the device's."""
        self.description = (
            f"query_only: {store.rows:,} passages of {store.folder}, {size / 2**20:,.0f} MiB on {self.location}"
        )

    def rows(self, rows: Integers, device: torch.device) -> Tensor:
        """The vectors [n, D] of some rows, float32."""
        return self._vectors.rows(rows, device)


def planned_device_bytes(store: EmbeddingStore, location: str, device: torch.device, precision: Precision) -> int:
    """Bytes on the device of a `FrozenCorpus` with the same arguments, before it is created."""
    size = store.rows * store.dim * _frozen_dtype(store, device, precision).itemsize
    return size if _choose_location(location, size, device) == "device" else 0


def _frozen_dtype(store: EmbeddingStore, device: torch.device, precision: Precision) -> torch.dtype:
    if precision == "bf16" and device.type == "cuda":
        return torch.bfloat16
    return torch.float16 if store.dtype == "float16" else torch.float32


def _choose_location(location: str, size: int, device: torch.device) -> str:
    if location != "auto":
        return location
    if device.type == "cuda" and size <= FREE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    if size <= FREE_SHARE * psutil.virtual_memory().available:
        return "host" if device.type == "cuda" else "device"
    return "disk"
