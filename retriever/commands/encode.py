"""`retriever encode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retriever.commands.common import Embedding, answer, check_counts
from retriever.progress import Terminal


@dataclass(frozen=True, kw_only=True)
class Encode(Embedding):
    """Embed a corpus into a sharded, checksummed store; run again after an interruption, it goes on."""

    data: Path
    """A BEIR folder (its corpus), or a .jsonl, .csv, .tsv (each also .gz) or .parquet file with columns _id (or id),
    text and, if you like, title."""
    out: Path
    """Folder of the store."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors on disk."""
    shard_rows: int = 65536
    """Passages a shard; at most so many are lost when a run is killed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "shard_rows")

    def run(self, terminal: Terminal) -> int:
        from eval.beir import beir_file
        from retriever.encode_files import embed_corpus

        corpus = beir_file(self.data, "corpus.jsonl") if self.data.is_dir() else self.data
        store = embed_corpus(
            self.towers(),
            corpus,
            self.out,
            self.options(),
            terminal,
            dtype=self.dtype,
            shard_rows=self.shard_rows,
        )
        answer(self.json, {"store": str(self.out), "rows": store.rows, "dim": store.dim, "dtype": store.dtype})
        return 0
