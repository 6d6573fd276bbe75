"""Texts to embeddings: a list in memory, or windows of texts that come one after another (corpus.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from retriever.data.length_sorting import make_micro_batches
from retriever.encoding.windows import WINDOW
from retriever.models.memory import MIN_TOKENS, EncodeMemory
from retriever.models.mixed_precision import mixed_precision
from retriever.models.tokenizer import TokenizedTexts
from retriever.models.towers import Side, Towers
from retriever.utils.device import HostCopy, Precision, to_device

Window = TypeVar("Window")


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
        options: mixed_precision and micro-batch size; they change the vectors by rounding only.
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
    before: tuple[Window, HostCopy] | None = None
    budget = options.micro_batch_tokens
    with mixed_precision(towers, options.precision):
        for window, tokens in windows:
            # A few queries fit in any case, and do not wait for a measurement.
            if budget is None and len(tokens.ids) > MIN_TOKENS:
                budget = EncodeMemory.plan(towers, texts=max(len(tokens), WINDOW)).micro_batch_tokens
            embeddings = _embed_tokens(towers, tokens, side, budget or MIN_TOKENS, progress)
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
) -> HostCopy:
    order = make_micro_batches(tokens.lengths, budget, padded=not towers.padding_free, device=towers.device.type)
    with torch.inference_mode():
        embeddings = torch.empty(len(tokens), towers.dimension, device=towers.device)
        for rows in order:
            embeddings[to_device(torch.from_numpy(rows), towers.device)] = towers.embed(tokens, rows, side).float()
            if progress is not None:
                progress(len(rows))
        return HostCopy(embeddings)
