"""Encoding of texts: a list in memory, or a stream of tokenized windows (corpus.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from retriever.data.length_sorting import make_micro_batches
from retriever.encoding.windows import WINDOW
from retriever.models.fsdp import encoding_mode
from retriever.models.memory import MIN_TOKENS, EncodeMemory
from retriever.models.mixed_precision import mixed_precision
from retriever.models.tokenizer import TokenizedTexts
from retriever.models.towers import Side, Towers
from retriever.utils.device import HostCopy, Precision, to_device

Window = TypeVar("Window")


@dataclass(frozen=True)
class EncodeOptions:
    """Precision and micro-batch size of encoding."""

    precision: Precision = "fp32"
    """Precision: "fp32", "bf16" or "fp16". bf16 on a GPU casts the encoder's weights; otherwise autocast is used."""
    micro_batch_tokens: int | None = None
    """Maximum number of tokens per forward pass, padding included. None: chosen by the device and its free memory."""


def embed_texts(
    towers: Towers,
    texts: Sequence[str],
    side: Side,
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
    *,
    prompt: str | None = None,
) -> np.ndarray:
    """Embed texts, in their order, with the prompt of their side.

    Args:
        towers: the model in evaluation mode, on the device to use.
        texts: M texts, without prompts.
        side: "query" or "document".
        options: precision and micro-batch size; they change the vectors by rounding only.
        progress: called with the number of texts encoded since the last call.
        prompt: the text that is put before each text. None: the prompt of the model.

    Returns:
        Embeddings, float32 [M, D].
    """
    return embed_counted(towers, texts, side, options, progress, prompt=prompt)[0]


def embed_counted(
    towers: Towers,
    texts: Sequence[str],
    side: Side,
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
    *,
    prompt: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`embed_texts`, with the number of tokens of each text.

    Returns:
        Embeddings, float32 [M, D], and the tokens that the model read, with prompt and special tokens, int64 [M].
    """
    if not texts:
        # Tokenizers fail on an empty list.
        return np.empty((0, towers.dimension), dtype=np.float32), np.empty(0, dtype=np.int64)
    tokens = _tokenize(towers, texts, side, prompt)
    ((_, embeddings),) = embed_windows(towers, [(texts, tokens)], side, options, progress)
    return embeddings, tokens.lengths


def _tokenize(towers: Towers, texts: Sequence[str], side: Side, prompt: str | None) -> TokenizedTexts:
    prompt = towers.prompt(side) if prompt is None else prompt
    return towers.tokenizer(side)([prompt + text for text in texts] if prompt else texts)


def embed_windows(
    towers: Towers,
    windows: Iterable[tuple[Window, TokenizedTexts]],
    side: Side,
    options: EncodeOptions,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Window, np.ndarray]]:
    """Yield each window with the embeddings of its texts, float32 [n, D].

    A window is yielded after the next one has been launched, so that a GPU does not wait for the caller.

    Args:
        towers: the model in evaluation mode, on the device to use.
        windows: (window, its tokenized texts); the window itself is passed through.
        side: "query" or "document".
        options: precision and micro-batch size.
        progress: called with the number of texts encoded since the last call.
    """
    previous: tuple[Window, HostCopy] | None = None
    budget = options.micro_batch_tokens
    with mixed_precision(towers, options.precision):
        for window, tokens in windows:
            # Few tokens fit in any case; measuring the memory would only delay them.
            if budget is None and len(tokens.ids) > MIN_TOKENS:
                budget = EncodeMemory.plan(towers, texts=max(len(tokens), WINDOW)).micro_batch_tokens
            embeddings = _embed_tokens(towers, tokens, side, budget or MIN_TOKENS, progress)
            if previous is not None:
                yield previous[0], previous[1].array()
            previous = window, embeddings
        if previous is not None:
            yield previous[0], previous[1].array()


def _embed_tokens(
    towers: Towers,
    tokens: TokenizedTexts,
    side: Side,
    budget: int,
    progress: Callable[[int], None] | None,
) -> HostCopy:
    micro_batches = make_micro_batches(
        tokens.lengths, budget, padded=not towers.padding_free, device=towers.device.type
    )
    with encoding_mode(towers):
        embeddings = torch.empty(len(tokens), towers.dimension, device=towers.device)
        for rows in micro_batches:
            embeddings[to_device(torch.from_numpy(rows), towers.device)] = towers.embed(tokens, rows, side).float()
            if progress is not None:
                progress(len(rows))
        return HostCopy(embeddings)
