"""Rows of an embedding store by the text of a passage, or by its id."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np

from index.files import InputError, atomic_path
from index.store.reader import EmbeddingStore
from retriever.data.false_negatives import Integers, concatenated_ranges
from retriever.data.known_positives import text_digests
from retriever.data.table import ExampleTable

# Files of version 1 have wrong rows behind the first 65,536 passages.
VERSION = 2
BATCH_ROWS = 2**16


class StoredTexts:
    """Memory-mapped digests of the passages of an embedding store. Picklable. Created by `open_stored_texts`.

    Texts that differ only in white space are equal. A text is compared with the passages, title included; only if no
    passage has it, with their ids.
    """

    def __init__(self, path: Path, store: str) -> None:
        self.path, self.store = path, store
        try:
            content = np.lib.format.open_memmap(path, mode="r")
            if content.ndim != 2 or content.dtype != np.int64 or len(content) != 4:
                raise ValueError("expected 4 rows of 64-bit integers")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: cannot be read (remove it to create it again): {error}") from None
        self._texts, self._text_rows, self._ids, self._id_rows = content

    def __reduce__(self) -> tuple[type[StoredTexts], tuple[Path, str]]:
        return StoredTexts, (self.path, self.store)

    def __len__(self) -> int:
        return len(self._texts)

    def first(self, keys: Integers) -> Integers:
        """Return the first row of each text, int64 [n]; −1 for a text that is not in the store.

        Args:
            keys: [n] digests (`text_digests`).
        """
        which, rows = self.all(keys)
        first = np.full(len(keys), np.iinfo(np.int64).max)
        np.minimum.at(first, which, rows)
        return np.where(first == np.iinfo(np.int64).max, -1, first)

    def all(self, keys: Integers) -> tuple[Integers, Integers]:
        """Return all rows of all texts.

        Args:
            keys: [n] digests.

        Returns:
            [R] positions in `keys`, ascending, and [R] rows of the store.
        """
        which, rows = _matches(self._texts, self._text_rows, keys)
        missing = np.setdiff1d(np.arange(len(keys)), which)
        if len(missing):
            by_id, id_rows = _matches(self._ids, self._id_rows, keys[missing])
            which, rows = np.concatenate([which, missing[by_id]]), np.concatenate([rows, id_rows])
            order = np.argsort(which, kind="stable")
            which, rows = which[order], rows[order]
        return which, rows


def _matches(digests: Integers, rows: Integers, keys: Integers) -> tuple[Integers, Integers]:
    starts, stops = np.searchsorted(digests, keys), np.searchsorted(digests, keys, side="right")
    counts = stops - starts
    return np.repeat(np.arange(len(keys)), counts), rows[concatenated_ranges(starts, counts)]


def open_stored_texts(
    store: EmbeddingStore, cache: Path, *, progress: Callable[[int], None] | None = None
) -> StoredTexts:
    """Find the digests of the passages of a store, unless the result is in the folder `cache`.

    Args:
        store: The embedding store.
        cache: Folder for the result, 32 bytes per passage.
        progress: Called with the number of passages read since the last call.
    """
    files = sorted((name, entry.sha256) for name, entry in store.manifest.files.items())
    key = hashlib.sha256(repr((VERSION, files)).encode()).hexdigest()[:24]
    path = cache / f"stored-{key}.npy"
    if not path.exists():
        texts, ids = np.empty(store.rows, np.int64), np.empty(store.rows, np.int64)
        row = 0
        passages = iter(store.passages())
        while batch := list(islice(passages, BATCH_ROWS)):
            stop = row + len(batch)
            texts[row:stop] = text_digests(passage.content for passage in batch)
            ids[row:stop] = text_digests(passage.id for passage in batch)
            row = stop
            if progress is not None:
                progress(len(batch))
        by_text, by_id = (np.argsort(keys, kind="stable") for keys in (texts, ids))
        parts = [texts[by_text], by_text, ids[by_id], by_id]
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.stack(parts).astype(np.int64), allow_pickle=False)
    return StoredTexts(path, str(store.folder))


def check_stored(texts: StoredTexts, tables: Iterable[ExampleTable], *, positives_only: bool, setting: str) -> None:
    """Check that the passages of the training data are in a store.

    Args:
        texts: The passages of the store.
        tables: The training data.
        positives_only: Whether only positives are needed, not hard negatives.
        setting: Name of the setting for messages.

    Raises:
        InputError: A passage is not in the store; the message names the first one and how many there are.
    """
    for table in tables:
        for first, wanted in _passages_of(table, positives_only):
            missing = np.flatnonzero(texts.first(text_digests(wanted)) < 0)
            if len(missing):
                raise InputError(
                    f"{setting}: expected every passage of {table.name} in {texts.store}, by its text or its id; among "
                    f"rows {first} to {first + BATCH_ROWS - 1}, {len(missing):,} are missing, the first is "
                    f"{wanted[missing[0]]!r:.80}"
                )


def _passages_of(table: ExampleTable, positives_only: bool) -> Iterable[tuple[int, list[str]]]:
    if positives_only:
        for number, (_, positives) in enumerate(table.texts(BATCH_ROWS)):
            yield number * BATCH_ROWS, [text for texts in positives for text in texts]
        return
    for start in range(0, len(table), BATCH_ROWS):
        rows = (table[row] for row in range(start, min(start + BATCH_ROWS, len(table))))
        yield start, [text for row in rows for text in (*row.positives, *row.negatives)]
