"""`retriever encode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from index.files import InputError
from index.progress import Reporter
from retriever.cli.commands.common import Embedding, answer, check_counts, same_settings
from retriever.errors import ConfigError

if TYPE_CHECKING:
    from index.store.reader import EmbeddingStore
    from retriever.distributed.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Encode(Embedding):
    """Embed a corpus, or a folder of pictures, into a sharded, checksummed store; run again after an interruption, it
    goes on. Under torchrun the processes share a corpus, shard by shard."""

    data: Path
    """A BEIR folder (its corpus), or a .jsonl, .csv, .tsv (each also .gz) or .parquet file with columns _id (or id),
    text and, if you like, title. Any other folder, with a model of pictures and texts: the pictures in it."""
    out: Path
    """Folder of the store."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors on disk."""
    shard_rows: int = 65536
    """Passages or pictures a shard; at most so many of each process are lost when a run is killed."""
    workers: int | None = None
    """Processes that read and tokenize a corpus, of each process of torchrun; 0: threads, as on a CPU. None: as many as
    a GPU needs, and the machine has processors for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "shard_rows")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers: expected a number from 0 on, found {self.workers}")

    def run(self, reporter: Reporter) -> int:
        from retriever.distributed.context import SilentReporter, joined_ranks

        same = same_settings("encode", self, self.device, "model", "data", "out", "device", "workers", "json")
        with joined_ranks(same) as ranks:
            reporter = reporter if ranks.first else SilentReporter()
            if not self._is_pictures():
                store = self._corpus(reporter, ranks)
            elif ranks.size > 1:
                raise ConfigError("--data: pictures are embedded by one process; start it without torchrun")
            else:
                store = self._pictures(reporter)
            if ranks.first:
                answer(self.json, {"store": str(self.out), "rows": store.rows, "dim": store.dim, "dtype": store.dtype})
        return 0

    def _is_pictures(self) -> bool:
        from index.beir import is_beir_folder
        from retriever.models.images.folder import is_image_text_model

        return self.data.is_dir() and not is_beir_folder(self.data) and is_image_text_model(self.model)

    def _pictures(self, reporter: Reporter) -> EmbeddingStore:
        from retriever.encoding.images import encode_pictures, picture_files

        # Before the model, which takes longer to load.
        picture_files(self.data)
        how: dict[str, Any] = {"dtype": self.dtype, "shard_rows": self.shard_rows}
        return encode_pictures(self.picture_towers(), self.data, self.out, self.options(), reporter, **how)

    def _corpus(self, reporter: Reporter, ranks: Ranks) -> EmbeddingStore:
        from index.beir import beir_file, is_beir_folder
        from index.image_files import images_in
        from retriever.distributed.context import own_device
        from retriever.encoding.files import embed_corpus
        from retriever.encoding.window_workers import workers_for

        # Before the folder is judged: a name that no model has cannot be said to embed texts alone.
        towers = self.towers(reporter)
        if self.data.is_dir() and not is_beir_folder(self.data) and images_in(self.data):
            raise InputError(
                f"{self.data}: expected a corpus for {self.model}, which embeds texts alone, found a folder of pictures"
            )
        corpus = beir_file(self.data, "corpus.jsonl") if self.data.is_dir() else self.data
        towers.to(own_device(towers.device))
        workers = workers_for(towers.device) if self.workers is None else self.workers
        how: dict[str, Any] = {"dtype": self.dtype, "shard_rows": self.shard_rows, "workers": workers}
        return embed_corpus(towers, corpus, self.out, self.options(), reporter, ranks=ranks, **how)
