"""A corpus of any size to the sharded store of its embeddings, in constant memory, by one process or several ranks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable
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
from retriever.encoding.distributed_store import SharedWriter
from retriever.encoding.encoder import EncodeOptions, embed_windows
from retriever.encoding.window_workers import corpus_windows
from retriever.encoding.windows import WINDOW, CorpusWindow, Cut, WindowMaker
from retriever.models.towers import Towers
from retriever.utils.prefetch import background_calls, short_switch_interval

# Windows that wait to be written.
MOST_WAITING = 2


def corpus_source(path: Path) -> dict[str, str]:
    """What identifies a corpus file to the store, so that a changed file is not taken for the one embedded."""
    return {"name": path.name, "sha256": sha256_file(path)}


def encode_passages(
    towers: Towers,
    passages: Iterable[Passage],
    out: Path,
    options: EncodeOptions,
    *,
    source: dict[str, str],
    dtype: Literal["float32", "float16"] = "float32",
    shard_rows: int = 65536,
    window: int = WINDOW,
    workers: int = 0,
    ranks: Ranks | None = None,
    same_model: bool = False,
    progress: Callable[[int], None] | None = None,
    notice: Callable[[str, str], None] | None = None,
    checked: Callable[[int], None] | None = None,
) -> EmbeddingStore:
    """Embed passages into the store `out`, in their order, in constant memory.

    A store that a killed run left is continued after its last whole shard; a complete one is left as it is. Several
    ranks embed and write a shard each at a time, and the store has the bytes that one process would write; they may be
    others, and of another number, than those that began it.

    Args:
        towers: in evaluation mode, on the device to use.
        passages: the corpus; read again from its start when a store is continued. Of a PassageFile each process reads
            little more than what it embeds.
        out: folder of the store; on a disk that all ranks see.
        options: mixed_precision and micro-batch size.
        source: says where the passages come from; a store of another precision or source is refused, but for one that
            was not finished and of whose passages the file is still the first ones: a bad row was mended behind them.
        dtype: "float32" or "float16", of the vectors on disk.
        shard_rows: rows a shard.
        window: most passages that are sorted by length together; vectors depend on it by rounding.
        workers: processes of this rank that read and tokenize; none for threads of this one.
        ranks: all those that call this with the same arguments, which are compared first.
        same_model: the ranks' models have been compared before, as those of a run are when it begins.
        progress: called with the number of passages done since the last call, those of an earlier run included; on the
            first rank with those of all.
        notice: called with what is odd in a passage that is embedded, and its id; on the first rank.
        checked: called with the number of bytes each time some of a store that is there already were checked against
            their sums; on the first rank.

    Raises:
        InputError: `out` holds something else, or the corpus is bad or empty.
        RanksDifferError: the ranks have other models, corpora, settings or folders.
        RuntimeError: another rank is gone.
    """
    ranks = ranks or Ranks()
    model = towers.fingerprint() if ranks.is_first or not same_model else {}
    corpus = ContentHash.of({name: value for name, value in source.items() if name != "name"}, source.get("name", ""))
    same = {
        "corpus": corpus,
        "precision": options.precision,
        "dtype": dtype,
        "shard_rows": shard_rows,
        "window": window,
    }
    check_same_on_ranks(ranks, same if same_model else {"model": ContentHash.of(model), **same})
    check_same_folder(ranks, "out", out)
    with contextlib.ExitStack() as held:
        writer = None
        if ranks.is_first:
            writer = EmbeddingWriter(
                out,
                dim=towers.dimension,
                dtype=dtype,
                model=model,
                # Vectors of another mixed_precision are others, and a report states which they were.
                source={**source, "precision": options.precision},
                shard_rows=shard_rows,
                same_rows=partial(_holds_first, passages, options) if isinstance(passages, PassageFile) else None,
                checked=checked,
            )
            held.enter_context(writer)
        row, complete = ranks.broadcast(writer and [writer.rows, writer.complete])
        if not complete:
            if progress is not None and row:
                progress(row)
            cut = Cut(shard_rows, window, towers.dimension, ranks.share)
            windows = corpus_windows(passages, row, cut, window_maker(towers, out), workers)
            if writer is not None and ranks.world_size == 1:
                row += _embed(towers, windows, options, partial(_append, writer, notice), progress)
            else:
                shared = SharedWriter(
                    ranks,
                    writer,
                    out,
                    dtype=dtype,
                    shard_rows=shard_rows,
                    rows=row,
                    progress=progress,
                    notice=notice,
                )
                # What another rank then waits for will not come, and its end ends this one's waiting.
                row += _embed(towers, windows, options, shared.take, progress, abandon=True)
                shared.close()
            # The first shard is the first rank's.
            if ranks.is_first and not row:
                raise InputError(f"{source.get('name', 'corpus')}: expected passages, found none")
    ranks.barrier()
    store = EmbeddingStore.open(out)
    # By the writer, every byte that it had not written itself.
    store.checked = True
    return store


def _holds_first(passages: PassageFile, options: EncodeOptions, store: EmbeddingStore) -> bool:
    """Whether a store, which another file was embedded to in the same way, holds the first passages of this one."""
    if store.source.get("precision") != options.precision:
        return False
    mine = itertools.islice(passages, store.rows)
    return all(stored == passage for stored, passage in itertools.zip_longest(store.passages(), mine))


def window_maker(towers: Towers, out: Path) -> WindowMaker:
    """What makes windows of passages for the towers and the store `out`."""
    return WindowMaker(towers.tokenizer("document"), towers.prompt("document"), str(out))


def _embed(
    towers: Towers,
    windows: Generator[CorpusWindow, None, None],
    options: EncodeOptions,
    take: Callable[[CorpusWindow, np.ndarray], None],
    progress: Callable[[int], None] | None,
    *,
    abandon: bool = False,
) -> int:
    """Let `take` have the windows with their vectors; returns how many passages they were."""
    rows = 0
    # Sums and files of one window are made while the next are on their way, which they would hold up.
    with (
        short_switch_interval(),
        contextlib.closing(windows),
        background_calls(take, MOST_WAITING, abandon=abandon) as later,
    ):
        tokenized = ((made, made.tokens) for made in windows)
        for made, vectors in embed_windows(towers, tokenized, "document", options, progress):
            later(made, vectors)
            rows += len(made)
    return rows


def _append(
    writer: EmbeddingWriter, notice: Callable[[str, str], None] | None, window: CorpusWindow, vectors: np.ndarray
) -> None:
    writer.append_lines(window.ids, window.lines, vectors)
    if notice is not None:
        for what, where in window.odd:
            notice(what, where)
