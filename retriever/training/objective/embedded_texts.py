"""A teacher's or guide's embeddings of all texts of the training data: embedded once, in embedding stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from index.files import InputError
from index.manifest import EMBEDDINGS, NAME, read_manifest
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
from retriever.models.modality import load_towers
from retriever.models.towers import Side, Towers
from retriever.training.objective.vectors import open_verified
from retriever.utils.device import Precision

Kind = Literal["queries", "passages"]
MIB = 2**20
DTYPE: Literal["float16"] = "float16"
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
        return checksum_of_texts(self._tables, self._corpus, self._kind)

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
            while batch := list(islice(texts, BATCH_ROWS)):
                yield batch


class EmbeddedTexts:
    """Stores of the embeddings that a teacher or a guide has of all texts of the training data, in a folder.

    Args:
        model: The model.
        tables: The training data.
        corpus: Passages that are drawn at random, too. Default: none.
        cache: Folder of the stores. Models with the same weights share them.
        precision: Precision of the model.
    """

    def __init__(
        self,
        model: Towers,
        tables: Sequence[ExampleTable],
        corpus: CorpusTable | None,
        cache: Path,
        precision: Precision,
    ) -> None:
        self._model, self._tables, self._corpus = model, tables, corpus
        self._cache, self._precision = cache, precision

    def folder(self, kind: Kind) -> Path:
        """Where the store is, or will be."""
        texts = checksum_of_texts(self._tables, self._corpus, kind)
        parts = [self._model.fingerprint(), texts, self._precision]
        return self._cache / f"texts-{kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}"

    @property
    def complete(self) -> bool:
        """Whether all texts are embedded."""
        return all(self._is_complete(kind) for kind in SIDE_OF)

    def store(self, kind: Kind, role: str, reporter: Reporter, ranks: Ranks) -> EmbeddingStore:
        """Open a store; embed the texts first unless it is complete. Every rank must call it.

        A complete store is used if all its bytes are as recorded. An interrupted run continues it.

        Args:
            kind: The texts.
            role: "teacher" or "guide", for messages.
            reporter: Receives progress.
            ranks: The ranks, which share the work.

        Raises:
            InputError: The store is damaged.
        """
        texts = UniqueTexts(self._tables, self._corpus, kind)
        with reporter.bar(f"{role}: encode {kind}", len(texts), "texts") as advance:
            return encode_passages(
                self._model,
                texts,
                self.folder(kind),
                EncodeOptions(self._precision),
                source={"name": kind, "sha256": texts.sha256},
                storage=StoreOptions(DTYPE),
                ranks=ranks,
                side=SIDE_OF[kind],
                progress=advance,
            )

    def plan(self, role: str, kinds: Iterable[Kind] = SIDE_OF) -> str:
        """A line about the work before the first step, for a plan of a run."""
        counts = {kind: len(UniqueTexts(self._tables, self._corpus, kind)) for kind in kinds}
        size = sum(counts.values()) * self._model.dimension * np.dtype(DTYPE).itemsize / MIB
        missing = [f"{count:,} {kind}" for kind, count in counts.items() if not self._is_complete(kind)]
        if not missing:
            return f"{role}: its embeddings of {' and '.join(f'{n:,} {k}' for k, n in counts.items())} are in the cache"
        return f"{role}: embeds {' and '.join(missing)} once, before the first step; {size:,.0f} MiB of stores on disk"

    def _is_complete(self, kind: Kind) -> bool:
        folder = self.folder(kind)
        return (folder / NAME).exists() and bool(read_manifest(folder, EMBEDDINGS).field("complete", bool))


def checksum_of_texts(tables: Sequence[ExampleTable], corpus: CorpusTable | None, kind: Kind) -> str:
    """Checksum of the queries or passages of training data."""
    parts = [kind, *(table.sha256 for table in tables)]
    if corpus is not None:
        # "2": before, one text of the corpus in 4,097 was left out.
        parts += [corpus.sha256, "2"]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
    given = _given_stores(config)
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
        texts = EmbeddedTexts(teacher, tables, corpus, cache, precision)
        for kind in missing:
            stores[kind] = texts.store(kind, "teacher", reporter, ranks)
    return {kind: stores[kind] for kind in given}


def teacher_plan(
    config: TeacherConfig, tables: Sequence[ExampleTable], corpus: CorpusTable | None, cache: Path, precision: Precision
) -> tuple[str, int]:
    """A line about the work before the first step, and the dimension of the teacher's embeddings."""
    missing = [kind for kind, folder in _given_stores(config).items() if not folder]
    if not missing:
        return f"teacher: its embeddings are in {config.queries} and {config.passages}", EmbeddingStore.open(
            config.queries
        ).dim
    teacher = load_towers(config.model)
    return EmbeddedTexts(teacher, tables, corpus, cache, precision).plan("teacher", missing), teacher.dimension


def _given_stores(config: TeacherConfig) -> dict[Kind, str]:
    return {"queries": config.queries, "passages": config.passages}
