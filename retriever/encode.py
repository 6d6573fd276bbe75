"""Texts to embeddings: a list in memory, or a corpus of any size to the sharded store."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from index.embeddings import EmbeddingStore, EmbeddingWriter
from index.files import InputError, sha256_file
from index.passages import Passage
from retriever.ahead import giving_way
from retriever.corpus_windows import WINDOW, CorpusWindow, Cut, WindowMaker, corpus_windows
from retriever.device import Arriving, Precision, to_device
from retriever.graph_memory import LEAST_TOKENS, EncodeMemory
from retriever.half_weights import arithmetic
from retriever.packing import pack
from retriever.tokens import TokenizedTexts
from retriever.towers import Side, Towers

# Windows that wait to be written.
MOST_WAITING = 2

Window = TypeVar("Window")


def corpus_source(path: Path) -> dict[str, str]:
    """What identifies a corpus file to the store, so that a changed file is not taken for the one embedded."""
    return {"name": path.name, "sha256": sha256_file(path)}


@dataclass(frozen=True)
class EncodeOptions:
    """How texts pass through the towers."""

    precision: Precision = "fp32"
    """fp32, or bf16 / fp16 by autocast."""
    micro_batch_tokens: int | None = None
    """Most tokens at once, padding included; none leaves it to the device and its free memory."""


def embed_texts(
    towers: Towers,
    texts: Sequence[str],
    side: Side,
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Embeddings of texts, in their order, with the model's prompt for that side.

    Args:
        towers: in evaluation mode, on the device to use.
        texts: without prompts.
        side: "query" or "document".
        options: arithmetic and micro-batch size; they change the vectors by rounding only.
        progress: called with the number of texts done since the last call.

    Returns:
        float32 [texts, dimension].
    """
    if not texts:
        # Tokenizers fail on no texts at all.
        return np.empty((0, towers.dimension), dtype=np.float32)
    tokens = _tokenized(towers, texts, side)
    ((_, embeddings),) = embed_windows(towers, [(texts, tokens)], side, options, progress)
    return embeddings


def _tokenized(towers: Towers, texts: Sequence[str], side: Side) -> TokenizedTexts:
    prompt = towers.prompt(side)
    return towers.tokenizer(side)([prompt + text for text in texts] if prompt else texts)


def embed_windows(
    towers: Towers,
    windows: Iterable[tuple[Window, TokenizedTexts]],
    side: Side,
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Window, np.ndarray]]:
    """Each window with the embeddings of its texts, float32 [texts, dimension].

    A window is handed out when the next one is on its way through the towers, so that a GPU does not wait for what is
    done with it.
    """
    before: tuple[Window, Arriving] | None = None
    budget = options.micro_batch_tokens
    with arithmetic(towers, options.precision):
        for window, tokens in windows:
            # A few queries fit in any case, and do not wait for a measurement.
            if budget is None and len(tokens.ids) > LEAST_TOKENS:
                budget = EncodeMemory.plan(towers, texts=max(len(tokens), WINDOW)).micro_batch_tokens
            embeddings = _embed_tokens(towers, tokens, side, budget or LEAST_TOKENS, progress)
            if before is not None:
                yield before[0], before[1].array()
            before = window, embeddings
        if before is not None:
            yield before[0], before[1].array()


def _embed_tokens(
    towers: Towers,
    tokens: TokenizedTexts,
    side: Side,
    budget: int,
    progress: Callable[[int], None] | None,
) -> Arriving:
    order = pack(tokens.lengths, budget, padded=not towers.padding_free, device=towers.device.type)
    with torch.inference_mode():
        embeddings = torch.empty(len(tokens), towers.dimension, device=towers.device)
        for rows in order:
            embeddings[to_device(torch.from_numpy(rows), towers.device)] = towers.embed(tokens, rows, side).float()
            if progress is not None:
                progress(len(rows))
        return Arriving(embeddings)


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
    progress: Callable[[int], None] | None = None,
    notice: Callable[[str, str], None] | None = None,
) -> EmbeddingStore:
    """Embed passages into the store `out`, in their order, in constant memory.

    A store that a killed run left is continued after its last whole shard; a complete one is left as it is.

    Args:
        towers: in evaluation mode, on the device to use.
        passages: the corpus; read again from its start when a store is continued.
        out: folder of the store.
        options: arithmetic and micro-batch size.
        source: says where the passages come from; a store of another source or precision is refused.
        dtype: "float32" or "float16", of the vectors on disk.
        shard_rows: rows a shard.
        window: most passages that are sorted by length together; vectors depend on it by rounding.
        workers: processes that read and tokenize, each of them the whole of `passages`; none for threads of this one.
        progress: called with the number of passages done since the last call, those of an earlier run included.
        notice: called with what is odd in a passage that is embedded, and its id.

    Raises:
        InputError: `out` holds something else, or the corpus is bad or empty.
    """
    with EmbeddingWriter(
        out,
        dim=towers.dimension,
        dtype=dtype,
        model=towers.fingerprint(),
        # Vectors of another arithmetic are others, and a report states which they were.
        source={**source, "precision": options.precision},
        shard_rows=shard_rows,
    ) as writer:
        if not writer.complete:
            row = writer.rows
            if progress is not None and row:
                progress(row)
            maker = window_maker(towers, out)
            windows = corpus_windows(passages, row, Cut(shard_rows, window, towers.dimension), maker, workers)
            with (
                giving_way(),
                contextlib.closing(windows),
                # Sums and files of one window are made while the next are on their way, which they would hold up.
                ThreadPoolExecutor(1, "writer") as writing,
            ):
                waiting: deque[Future[None]] = deque()
                tokenized = ((made, made.tokens) for made in windows)
                for made, vectors in embed_windows(towers, tokenized, "document", options, progress):
                    if len(waiting) == MOST_WAITING:
                        waiting.popleft().result()
                    waiting.append(writing.submit(_append, writer, made, vectors, waiting[-1] if waiting else None))
                    row += len(made)
                    if notice is not None:
                        for what, where in made.odd:
                            notice(what, where)
                for written in waiting:
                    written.result()
            if row == 0:
                raise InputError(f"{source.get('name', 'corpus')}: expected passages, found none")
            writer.close()
    return EmbeddingStore.open(out)


def window_maker(towers: Towers, out: Path) -> WindowMaker:
    """What makes windows of passages for the towers and the store `out`."""
    return WindowMaker(towers.tokenizer("document"), towers.prompt("document"), str(out))


def _append(writer: EmbeddingWriter, window: CorpusWindow, vectors: np.ndarray, before: Future[None] | None) -> None:
    # What stopped the window before this one stops this one too: rows that are missing are never in the middle.
    if before is not None:
        before.result()
    writer.append_lines(window.ids, window.lines, vectors)
