"""Encoding of a corpus of any size into an embedding store, in constant memory, by one process or several ranks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from index.files import InputError, sha256_file
from index.passages import Passage, PassageFile
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.distributed.agreement import ContentHash, check_same_folder, check_same_on_ranks
from retriever.distributed.ranks import Ranks
from retriever.encoding.distributed_store import DistributedWriter
from retriever.encoding.encoder import EncodeOptions, embed_windows
from retriever.encoding.window_workers import corpus_windows
from retriever.encoding.windows import WINDOW, CorpusWindow, WindowBuilder, WindowSchedule
from retriever.models.towers import Side, Towers
from retriever.utils.prefetch import background_calls, short_switch_interval

# Encoded windows that may wait to be written.
WRITE_QUEUE = 2


@dataclass(frozen=True)
class StoreOptions:
    """How the embeddings of a corpus are stored, and how its texts are read."""

    dtype: Literal["float32", "float16", "int8", "binary"] = "float32"
    """Dtype of the vectors on disk."""
    shard_rows: int = 65536
    """Rows per shard."""
    window: int = WINDOW
    """Maximum number of passages that are sorted by length together; changes the vectors by rounding only."""
    workers: int = 0
    """Processes of each rank that read and tokenize; 0: threads of the rank's own process."""


def corpus_source(path: Path, fields: Sequence[str] = ()) -> dict[str, str]:
    """Identify a corpus file in the manifest of its store, so that a changed file or other fields are noticed."""
    kept = {"fields": ", ".join(fields)} if fields else {}
    return {"name": path.name, "sha256": sha256_file(path), **kept}


def encode_passages(
    towers: Towers,
    passages: Iterable[Passage],
    out: Path,
    options: EncodeOptions,
    *,
    source: dict[str, str],
    storage: StoreOptions | None = None,
    ranks: Ranks | None = None,
    same_model: bool = False,
    side: Side = "document",
    progress: Callable[[int], None] | None = None,
    notice: Callable[[str, str], None] | None = None,
    checked: Callable[[int], None] | None = None,
) -> EmbeddingStore:
    """Embed passages, in their order, into the store `out`, in constant memory.

    An incomplete store, for example of a killed run, is continued after its last complete shard; a complete one is
    left unchanged. Several ranks encode and write one shard each at a time. The bytes of the store do not depend on
    the number of ranks, which may change when a store is continued.

    Args:
        towers: the model in evaluation mode, on the device to use.
        passages: the corpus; read again from the start when a store is continued. Of a PassageFile each process parses
            little more than what it encodes.
        out: the folder of the store, on a disk that all ranks share.
        options: precision and micro-batch size.
        source: identifies the corpus. A store of another source or precision is refused, unless it is incomplete and
            the first passages of the file are those of the store, so that a bad row after them can be corrected.
        storage: dtype and shards of the store, and how the corpus is read. Default: None, the defaults of StoreOptions.
        ranks: all ranks; each must call with the same arguments, which are compared first. Default: None, one process.
        same_model: the models of the ranks have been compared before, as at the start of a training run.
        side: whether the texts are embedded as passages ("document", the default) or as queries ("query").
        progress: called with the number of passages encoded since the last call, including those of an earlier run;
            on the first rank with those of all ranks.
        notice: called on the first rank with what is unusual in an encoded passage, and the passage id.
        checked: called on the first rank with the number of bytes of an existing store just verified.

    Returns:
        The complete store.

    Raises:
        InputError: `out` holds something else, or the corpus is invalid or empty.
        RanksDifferError: the ranks have different models, corpora, options or folders.
        RuntimeError: another rank has exited.
    """
    ranks, storage = ranks or Ranks(), storage or StoreOptions()
    model = towers.fingerprint() if ranks.is_first or not same_model else {}
    _check_ranks_agree(ranks, out, options, storage, source, {} if same_model else {"model": ContentHash.of(model)})
    with contextlib.ExitStack() as stack:
        writer = None
        if ranks.is_first:
            writer = EmbeddingWriter(
                out,
                dim=towers.dimension,
                dtype=storage.dtype,
                model=model,
                # The precision changes the vectors, and reports state it.
                source={**source, "precision": options.precision, **({"side": side} if side == "query" else {})},
                shard_rows=storage.shard_rows,
                same_rows=partial(_begins_with, passages, options) if isinstance(passages, PassageFile) else None,
                checked=checked,
            )
            stack.enter_context(writer)
        row, complete = ranks.broadcast(writer and [writer.rows, writer.complete])
        if not complete:
            if progress is not None and row:
                progress(row)
            schedule = WindowSchedule(storage.shard_rows, storage.window, towers.dimension, ranks.share)
            windows = corpus_windows(passages, row, schedule, window_builder(towers, out, side), storage.workers)
            if writer is not None and ranks.world_size == 1:
                row += _embed(towers, windows, side, options, partial(_append, writer, notice), progress)
            else:
                shared = DistributedWriter(
                    ranks,
                    writer,
                    out,
                    dtype=storage.dtype,
                    shard_rows=storage.shard_rows,
                    rows=row,
                    progress=progress,
                    notice=notice,
                )
                # After an error the other ranks' messages never arrive, so pending writes are abandoned.
                row += _embed(towers, windows, side, options, shared.add, progress, abandon=True)
                shared.close()
            # The first rank encodes the first shard, so it has rows unless the corpus is empty.
            if ranks.is_first and not row:
                raise InputError(f"{source.get('name', 'corpus')}: expected passages, found none")
    ranks.barrier()
    store = EmbeddingStore.open(out)
    # The writer has verified every byte that it did not write itself.
    store.checked = True
    return store


def _check_ranks_agree(
    ranks: Ranks,
    out: Path,
    options: EncodeOptions,
    storage: StoreOptions,
    source: dict[str, str],
    model: dict[str, ContentHash],
) -> None:
    corpus = ContentHash.of({name: value for name, value in source.items() if name != "name"}, source.get("name", ""))
    fields = {
        **model,
        "corpus": corpus,
        "precision": options.precision,
        "dtype": storage.dtype,
        "shard_rows": storage.shard_rows,
        "window": storage.window,
    }
    check_same_on_ranks(ranks, fields)
    check_same_folder(ranks, "out", out)


def _begins_with(passages: PassageFile, options: EncodeOptions, store: EmbeddingStore) -> bool:
    """Whether the rows of an incomplete store are the first of `passages`, encoded with the same precision."""
    if store.source.get("precision") != options.precision:
        return False
    first = itertools.islice(passages, store.rows)
    return all(stored == passage for stored, passage in itertools.zip_longest(store.passages(), first))


def window_builder(towers: Towers, out: Path, side: Side = "document") -> WindowBuilder:
    """The builder of windows for a tower and the store `out`."""
    return WindowBuilder(towers.tokenizer(side), towers.prompt(side), str(out))


def _embed(
    towers: Towers,
    windows: Generator[CorpusWindow, None, None],
    side: Side,
    options: EncodeOptions,
    write: Callable[[CorpusWindow, np.ndarray], None],
    progress: Callable[[int], None] | None,
    *,
    abandon: bool = False,
) -> int:
    """Embed the windows and pass each with its embeddings to `write`; returns the number of passages."""
    rows = 0
    # A thread hashes and writes a window while the next one is encoded.
    with (
        short_switch_interval(),
        contextlib.closing(windows),
        background_calls(write, WRITE_QUEUE, abandon=abandon) as write_later,
    ):
        tokenized = ((window, window.tokens) for window in windows)
        for window, vectors in embed_windows(towers, tokenized, side, options, progress):
            write_later(window, vectors)
            rows += len(window)
    return rows


def _append(
    writer: EmbeddingWriter, notice: Callable[[str, str], None] | None, window: CorpusWindow, vectors: np.ndarray
) -> None:
    writer.append_lines(window.ids, window.lines, vectors)
    if notice is not None:
        for what, passage in window.notices:
            notice(what, passage)
