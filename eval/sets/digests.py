"""Duplicate detection by digests, and a reproducible sample of texts."""

from __future__ import annotations

import hashlib

import numpy as np

SAMPLE = 4096


def digest(text: str) -> bytes:
    """A 16-byte BLAKE2b digest of a text."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def repetitions(digests: bytearray) -> dict[int, int]:
    """Map the position of each repeated 16-byte digest to the first position with the same digest."""
    if not digests:
        return {}
    keys = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    # In sorted order, each group of equal digests is preceded by the position where it starts.
    firsts = np.maximum.accumulate(np.where(np.concatenate(([True], ~same)), np.arange(len(order)), 0))[1:]
    later = np.flatnonzero(same) + 1
    return dict(zip(order[later].tolist(), order[firsts[later - 1]].tolist(), strict=True))


class Sample:
    """A uniform sample of up to SAMPLE texts by the hash of their ids, in constant memory and without a seed."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, str]] = []
        self._limit = 2**64

    def add(self, id_: str, text: str) -> None:
        """Consider a text for the sample."""
        key = int.from_bytes(hashlib.blake2b(id_.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
        if key < self._limit:
            self._kept.append((key, text))
            while len(self._kept) > SAMPLE:
                self._limit //= 2
                self._kept = [(key, text) for key, text in self._kept if key < self._limit]

    def texts(self) -> list[str]:
        """The texts of the sample."""
        return [text for _, text in self._kept]
