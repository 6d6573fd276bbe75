"""`retriever encode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.progress import Reporter
from retriever.cli.commands.common import TruncatedEmbedding, answer
from retriever.utils.torchrun import rank


@dataclass(frozen=True, kw_only=True)
class Encode(TruncatedEmbedding):
    """Embed a corpus, or a folder of images, into a sharded store with checksums.

    An interrupted command continues when it is repeated. Under torchrun the processes share a corpus.
    """

    data: Path
    """A BEIR folder (its corpus), or a .jsonl, .csv, .tsv (each also .gz) or .parquet file with the columns _id (or
    id), text and optionally title. With an image–text model also a folder of images."""
    out: Path
    """Folder of the store."""
    dtype: Literal["float32", "float16"] = "float32"
    """Dtype of the embeddings on disk."""
    shard_rows: int = 65536
    """Passages or images per shard; at most this many per process are lost if a run is killed."""
    fields: tuple[str, ...] = ()
    """Further columns of the corpus that an index keeps, for results and filters. metadata.year: year in the object
    metadata."""
    workers: int | None = None
    """Processes that read and tokenize the corpus, for each process of torchrun; 0: threads. None: as many as a GPU
    needs and the machine has processors for; threads on a CPU."""

    def run(self, reporter: Reporter) -> int:
        from retriever.encoding.encode import encode

        store = encode(
            self.model,
            self.data,
            self.out,
            dtype=self.dtype,
            shard_rows=self.shard_rows,
            workers=self.workers,
            fields=self.fields,
            **self.embedding_options(),
            progress=reporter,
        )
        if rank() == 0:
            answer(self.json, {"store": str(self.out), "rows": store.rows, "dim": store.dim, "dtype": store.dtype})
        return 0
