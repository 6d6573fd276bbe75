"""A teacher's embeddings of all texts of the training data: embedded once, in embedding stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from index.files import InputError
from index.passages import Passage
from index.progress import Reporter
from index.store.reader import EmbeddingStore
from retriever.config.loss_options import TeacherConfig
from retriever.data.false_negatives import Integers
from retriever.data.known_positives import text_digests
from retriever.data.stored.corpus import CorpusTable
from retriever.data.table import BATCH_ROWS, ExampleTable
from retriever.distributed.ranks import Ranks
from retriever.encoding.corpus import StoreOptions, encode_passages
from retriever.encoding.encoder import EncodeOptions
from retriever.models.towers import Side, Towers, load_towers
from retriever.training.objective.vectors import open_verified
from retriever.utils.device import Precision

Kind = Literal["queries", "passages"]
SIDE_OF: dict[Kind, Side] = {"queries": "query", "passages": "document"}


class UniqueTexts:
    """The different queries or passages of training data, in order. Texts that differ only in white space are equal.

    Takes 9 bytes per text, with repetitions.
    """

    def __init__(self, tables: Sequence[ExampleTable], corpus: CorpusTable | None, kind: Kind) -> None:
        self._tables, self._corpus, self._kind = tables, corpus, kind
        digests = [text_digests(batch) for batch in self._batches()]
        self._digests: Integers = np.concatenate(digests) if digests else np.empty(0, np.int64)
        self._is_first = np.zeros(len(self._digests), bool)
        self._is_first[np.unique(self._digests, return_index=True)[1]] = True

    def __len__(self) -> int:
        return int(self._is_first.sum())

    def __iter__(self) -> Iterator[Passage]:
        """Yield each text once, with its digest as id."""
        row = 0
        for batch in self._batches():
            for text in batch:
                if self._is_first[row]:
                    yield Passage(f"{int(self._digests[row]) & (2**64 - 1):016x}", "", text)
                row += 1

    @property
    def sha256(self) -> str:
        """Checksum of the texts."""
        parts = [self._kind, *(table.sha256 for table in self._tables)]
        if self._corpus is not None:
            parts.append(self._corpus.sha256)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _batches(self) -> Iterator[list[str]]:
        for table in self._tables:
            for start in range(0, len(table), BATCH_ROWS):
                rows = (table[row] for row in range(start, min(start + BATCH_ROWS, len(table))))
                if self._kind == "queries":
                    yield [row.query for row in rows]
                else:
                    yield [text for row in rows for text in (*row.positives, *row.negatives)]
        if self._corpus is not None and self._kind == "passages":
            texts = iter(self._corpus)
            while batch := [text for text, _ in zip(texts, range(BATCH_ROWS), strict=False)]:
                yield batch


def teacher_stores(
    config: TeacherConfig,
    tables: Sequence[ExampleTable],
    corpus: CorpusTable | None,
    cache: Path,
    *,
    device: torch.device,
    precision: Precision,
    reporter: Reporter,
    ranks: Ranks,
) -> dict[Kind, EmbeddingStore]:
    """Open the teacher's embeddings; embed the texts first unless the stores are in `cache`. Every rank must call it.

    A store in the cache is used if its texts, the teacher's weights and all its bytes are as recorded. An interrupted
    run continues it.

    Args:
        config: The teacher.
        tables: The training data.
        corpus: Passages that are drawn at random, too. Default: none.
        cache: Folder of the stores.
        device: Device of the teacher.
        precision: Precision of the teacher.
        reporter: Receives progress.
        ranks: The ranks, which share the work.

    Raises:
        InputError: The model or a store cannot be read, or the two do not belong together.
    """
    given: dict[Kind, str] = {"queries": config.queries, "passages": config.passages}
    stores = {kind: open_verified(folder, reporter) for kind, folder in given.items() if folder}
    missing = [kind for kind in given if kind not in stores]
    if missing or config.model:
        teacher: Towers = load_towers(config.model, device)
        for kind, store in stores.items():
            if store.model != teacher.fingerprint():
                raise InputError(
                    f"loss.teacher.{kind}: expected embeddings of {config.model}, found those of another model in "
                    f"{store.folder}"
                )
        for kind in missing:
            texts = UniqueTexts(tables, corpus, kind)
            key = hashlib.sha256(json.dumps([teacher.fingerprint(), texts.sha256, precision]).encode()).hexdigest()[:24]
            with reporter.bar(f"teacher: encode {kind}", len(texts), "texts") as advance:
                stores[kind] = encode_passages(
                    teacher,
                    texts,
                    cache / f"teacher-{kind}-{key}",
                    EncodeOptions(precision),
                    source={"name": kind, "sha256": texts.sha256},
                    storage=StoreOptions("float16"),
                    ranks=ranks,
                    side=SIDE_OF[kind],
                    progress=advance,
                )
    return {kind: stores[kind] for kind in given}
