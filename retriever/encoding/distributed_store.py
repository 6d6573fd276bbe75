"""An embedding store that several ranks write together; the first rank lists the shards of all."""

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


class DistributedWriter:
    """Writes the shards r, r + W, … of a store from rank r. Every rank creates one, adds its windows and closes it.

    Shards are written in rounds, one per rank. At the end of a round the ranks exchange what they have written, and
    the first rank adds it to the manifest. A killed job loses at most one round. A round with an incomplete or an
    empty shard is the last one.

    Args:
        ranks: all ranks; no other exchange between them may happen until `close`.
        writer: the writer of the store on the first rank; None on the others.
        folder: the folder of the store, on a disk that all ranks share.
        dtype: dtype of the stored vectors, "float32" or "float16".
        shard_rows: rows per shard.
        rows: rows that the store already has, in complete shards.
        progress: called on the first rank with the number of rows that other ranks have written.
        notice: called on the first rank with what is unusual in a passage, and the passage id.
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
        # A store begun by another number of ranks may end in the middle of a round.
        complete = rows // shard_rows
        self._shard = complete + (ranks.rank - complete) % ranks.world_size
        self._buffer, self._notices = ShardBuffer(), list[tuple[str, str]]()
        self._is_last_round = False

    def add(self, window: CorpusWindow, vectors: np.ndarray) -> None:
        """Add a window of this rank with its embeddings [n, D].

        Raises:
            InputError: a vector contains NaN or infinity or overflows the dtype; on the first rank, an id of any rank
                is a duplicate.
            OSError: the disk is full.
        """
        row = self._shard * self._shard_rows + len(self._buffer)
        stored = stored_vectors(vectors, self._dtype, window.ids, self._folder, row)
        self._buffer.add(window.ids, stored, window.lines)
        self._notices += window.notices
        if len(self._buffer) == self._shard_rows:
            self._end_round()

    def close(self) -> None:
        """Write the last, incomplete shard if this rank has it, and finish the last round."""
        if not self._is_last_round:
            self._end_round()

    def _end_round(self) -> None:
        rows = len(self._buffer)
        files = self._buffer.write(self._folder, self._shard) if rows else {}
        entries = {name: asdict(entry) for name, entry in files.items()}
        written = {"shard": self._shard, "rows": rows, "files": entries, "notices": self._notices}
        shards = self._ranks.all_gather(written)
        self._is_last_round = any(shard["rows"] < self._shard_rows for shard in shards)
        if self._writer is not None:
            for shard in sorted(shards, key=lambda shard: shard["shard"]):
                self._add_to_store(shard, self._writer)
        self._buffer, self._notices = ShardBuffer(), []
        self._shard += self._ranks.world_size

    def _add_to_store(self, shard: dict[str, Any], writer: EmbeddingWriter) -> None:
        if shard["rows"]:
            writer.adopt_shard(shard["rows"], {name: FileEntry(**entry) for name, entry in shard["files"].items()})
        if self._progress is not None and shard["shard"] != self._shard:
            self._progress(shard["rows"])
        if self._notice is not None:
            for what, passage in shard["notices"]:
                self._notice(what, passage)
