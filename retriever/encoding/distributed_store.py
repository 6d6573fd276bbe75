"""A store of embeddings that several ranks write together: each its own shards, which the first rank lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from index.manifest import FileEntry
from index.store.shards import ShardBuffer, stored_vectors
from index.store.writer import EmbeddingWriter
from retriever.distributed.ranks import Ranks
from retriever.encoding.windows import CorpusWindow


class SharedWriter:
    """Writes this rank's shards r, r + W, … of a store; made, given windows and closed by every rank.

    Shards come in rounds, one of each rank. At the end of a round the ranks tell each other what they have written, and
    the first one takes it into the store; what a killed job loses is a round. The round in which a shard is short, or
    has no rows at all, is the last.

    Args:
        ranks: all of them, who exchange nothing else until it is closed.
        writer: the store's, on the first rank; none on others.
        folder: the store, on a disk that all ranks see.
        dtype: "float32" or "float16", as stored.
        shard_rows: rows a shard.
        rows: that the store has already, in whole shards.
        progress: called on the first rank with the number of rows that others have written.
        notice: called on the first rank with what is odd in a passage, and its id.
    """

    def __init__(
        self,
        ranks: Ranks,
        writer: EmbeddingWriter | None,
        folder: Path,
        *,
        dtype: str,
        shard_rows: int,
        rows: int,
        progress: Callable[[int], None] | None,
        notice: Callable[[str, str], None] | None,
    ) -> None:
        self._ranks, self._writer = ranks, writer
        self._folder, self._dtype, self._shard_rows = folder, dtype, shard_rows
        self._progress, self._notice = progress, notice
        # A store that is continued may end anywhere in a round: another number of ranks began it.
        begun = rows // shard_rows
        self._number = begun + (ranks.rank - begun) % ranks.world_size
        self._buffer, self._odd = ShardBuffer(), list[tuple[str, str]]()
        self._last = False

    def take(self, window: CorpusWindow, vectors: np.ndarray) -> None:
        """Add the rows of a window of this rank.

        Raises:
            InputError: a vector holds NaN or infinity or does not fit the dtype; on the first rank, an id of any rank
                is a duplicate.
            OSError: the disk is full.
        """
        row = self._number * self._shard_rows + len(self._buffer)
        stored = stored_vectors(vectors, self._dtype, window.ids, self._folder, row)
        self._buffer.add(window.ids, stored, window.lines)
        self._odd += window.odd
        if len(self._buffer) == self._shard_rows:
            self._end_round()

    def close(self) -> None:
        """Write the last, shorter shard, if it is this rank's, and see the last round to its end."""
        if not self._last:
            self._end_round()

    def _end_round(self) -> None:
        rows = len(self._buffer)
        files = self._buffer.write(self._folder, self._number) if rows else {}
        entries = {name: asdict(entry) for name, entry in files.items()}
        reports = self._ranks.all_gather({"number": self._number, "rows": rows, "files": entries, "odd": self._odd})
        self._last = any(report["rows"] < self._shard_rows for report in reports)
        if self._writer is not None:
            for report in sorted(reports, key=lambda report: report["number"]):
                self._take_in(report, self._writer)
        self._buffer, self._odd = ShardBuffer(), []
        self._number += self._ranks.world_size

    def _take_in(self, report: dict[str, Any], writer: EmbeddingWriter) -> None:
        if report["rows"]:
            writer.adopt_shard(report["rows"], {name: FileEntry(**entry) for name, entry in report["files"].items()})
        if self._progress is not None and report["number"] != self._number:
            self._progress(report["rows"])
        if self._notice is not None:
            for what, where in report["odd"]:
                self._notice(what, where)
