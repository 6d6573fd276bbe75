"""Tokenization in processes of their own: a GPU reads texts faster than one process, held up by its threads, makes
tokens of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from retriever.interrupt import leave_signals_to_the_parent
from retriever.tokens import TextTokenizer, TokenizedTexts

# One makes a quarter to half a million tokens a second of BERT's; more than this a GPU with BERT-base does not read.
MOST_WORKERS = 12


def token_workers(device: torch.device) -> int:
    """How many processes tokenize for towers on this device; none for a CPU, which has no time for them."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if device.type != "cuda" else max(0, min(MOST_WORKERS, cores // ranks - 2))


def tokenized(tokenizer: TextTokenizer, pieces: Iterator[Sequence[str]], workers: int) -> Iterator[TokenizedTexts]:
    """The tokens of each piece, in order, made by `workers` processes (one at least) that are up to two pieces ahead.

    What reading `pieces` raises is raised at once, before the pieces that are on their way.
    """
    yield from DataLoader(
        _Tokenize(tokenizer),
        batch_size=None,
        # The texts themselves stand for the places in a dataset: they are read here, and sent to the workers.
        sampler=pieces,
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        worker_init_fn=_worker_begins,
    )


@dataclass(frozen=True)
class _Tokenize(Dataset[TokenizedTexts]):
    tokenizer: TextTokenizer

    def __getitem__(self, texts: Any) -> TokenizedTexts:
        return self.tokenizer(texts)


def _worker_begins(worker: int) -> None:
    leave_signals_to_the_parent(worker)
    # Each is one of several, and its parent's threads did not come with it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _unchanged(tokens: Any) -> Any:
    return tokens
