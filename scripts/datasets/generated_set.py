"""Generates a BEIR set of any size: placeholder texts, and embeddings of its passages and queries."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from index.passages import read_passages
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

ROWS_AT_ONCE = 65536
RELEVANT = 3


def generate(options: argparse.Namespace, folder: Path) -> tuple[Path, np.ndarray]:
    """Write a BEIR folder. Returns it and its queries [Q, D], each close to its RELEVANT relevant passages."""
    data = folder / "generated"
    (data / "qrels").mkdir(parents=True)
    with open(data / "corpus.jsonl", "w", encoding="utf-8") as stream:
        for row in range(options.rows):
            stream.write(json.dumps({"_id": f"d{row}", "title": "", "text": f"passage number {row}"}) + "\n")
    generator = np.random.default_rng(1)
    judged = generator.integers(0, options.rows, (options.queries, RELEVANT))
    with open(data / "queries.jsonl", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"_id": f"q{n}", "text": f"query {n}"}) + "\n" for n in range(options.queries))
    with open(data / "qrels" / "test.tsv", "w", encoding="utf-8") as stream:
        stream.write("query-id\tcorpus-id\tscore\n")
        for query, rows in enumerate(judged.tolist()):
            stream.writelines(f"q{query}\td{row}\t{1 + row % 3}\n" for row in sorted(set(rows)))
    wanted = np.unique(judged)
    near = np.empty((len(wanted), options.dim), np.float32)
    for first, some in vectors(options):
        here = (wanted >= first) & (wanted < first + len(some))
        near[here] = some[wanted[here] - first]
    queries = near[np.searchsorted(wanted, judged)].mean(axis=1)
    queries += 0.6 / options.dim**0.5 * generator.normal(size=queries.shape)
    return data, (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def vectors(options: argparse.Namespace) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, unit vectors [n, D]) of the corpus. Every call gives the same vectors."""
    for first in range(0, options.rows, ROWS_AT_ONCE):
        generator = np.random.default_rng((0, first))
        some = generator.standard_normal((min(ROWS_AT_ONCE, options.rows - first), options.dim), dtype=np.float32)
        yield first, some / np.linalg.norm(some, axis=1, keepdims=True)


def embed(options: argparse.Namespace, data: Path, folder: Path) -> EmbeddingStore:
    """Write the corpus to an embedding store, as if a model had encoded it."""
    passages = read_passages(data / "corpus.jsonl")
    with EmbeddingWriter(folder, dim=options.dim, model={"sha256": "none"}, source={"name": "generated"}) as writer:
        for _, some in vectors(options):
            writer.append([next(passages) for _ in range(len(some))], some)
    return EmbeddingStore.open(folder)
