"""`retriever encode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.progress import Reporter
from retriever.cli.commands.common import Switch, TruncatedEmbedding, answer
from retriever.utils.torchrun import rank


@dataclass(frozen=True, kw_only=True)
class Encode(TruncatedEmbedding):
    """Embed a corpus, or images, into a sharded store with checksums.

    An interrupted command continues when it is repeated. Under torchrun the processes share the work.
    """

    data: str
    """A BEIR folder (its corpus), or a .jsonl, .csv, .tsv (each also .gz) or .parquet file with the columns _id (or
    id), text and optionally title. With an image–text model also images: a folder of image files, webdataset tars (a
    folder, braces or wildcards, .tar.gz, a URL), a table with a column of images or their paths, or a folder of Parquet
    files or of a saved Hugging Face dataset."""
    out: Path
    """Folder of the store."""
    dtype: Literal["float32", "float16", "int8", "binary"] = "float32"
    """Dtype of the embeddings on disk. int8 and binary (1 bit per value) need embeddings of unit length."""
    shard_rows: int = 65536
    """Passages or images per shard; at most this many per process are lost if a run is killed."""
    fields: tuple[str, ...] = ()
    """Further columns of the corpus that an index keeps, for results and filters. metadata.year: year in the object
    metadata."""
    workers: int | None = None
    """Number of processes that read and tokenize the corpus, for each process of torchrun. 0: threads. None: threads on
    a CPU; on a GPU as many processes as keep it busy, if the machine has enough processors."""
    image: str = ""
    """Column of a table with the images or their paths. Empty: the first of image, filepath, file_name, path and file,
    unless the table has the columns of a corpus."""
    caption: str = ""
    """Captions of images, which a search shows: a column of a table, or txt or json:KEY of tars. Empty: the first of
    the columns caption, captions, text and title; txt in tars, otherwise the json key caption."""

    skip_broken: Switch = False
    """Leave out the rows of a corpus that cannot be read; OUT/left_out.jsonl names them. By default, the first one is
    an error. Unreadable images are always left out and named there."""

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
            image=self.image,
            caption=self.caption,
            skip_broken=self.skip_broken,
            **self.embedding_options(),
            progress=reporter,
        )
        if rank() == 0:
            answer(self.json, {"store": str(self.out), "rows": store.rows, "dim": store.dim, "dtype": store.dtype})
        return 0
