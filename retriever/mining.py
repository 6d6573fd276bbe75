"""Hard negatives: for every query, passages that a model ranks high and that no judgement calls relevant."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.ranking import rows_of
from index import exact
from index.beir import BeirDataset
from index.embeddings import EmbeddingStore
from index.files import atomic_path
from retriever.encode import EncodeOptions
from retriever.encode_files import embed_corpus, embed_queries
from retriever.progress import Terminal
from retriever.towers import Towers


def mine_with_towers(
    towers: Towers,
    dataset: BeirDataset,
    out: Path,
    options: EncodeOptions,
    terminal: Terminal,
    *,
    embeddings: Path | None,
    negatives: int,
    depth: int,
    max_share: float,
) -> tuple[int, int]:
    """Embed corpus and queries, then `mine`. `embeddings` is the corpus's store; none for a temporary one."""
    # Before hours of encoding, not after.
    dataset.check(passage.id for passage in dataset.passages())
    with tempfile.TemporaryDirectory() as temporary:
        folder = embeddings or Path(temporary) / "embeddings"
        store = embed_corpus(towers, dataset.corpus_file, folder, options, terminal)
        queries = embed_queries(towers, list(dataset.queries.values()), options, terminal)
        with terminal.bar("search", store.rows, "passages") as advance:
            return mine(
                dataset,
                store=store,
                queries=queries,
                out=out,
                negatives=negatives,
                depth=depth,
                max_share=max_share,
                device=str(towers.device),
                progress=advance,
            )


def mine(
    dataset: BeirDataset,
    *,
    store: EmbeddingStore,
    queries: np.ndarray,
    out: Path,
    negatives: int = 7,
    depth: int = 100,
    max_share: float = 0.95,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Write one JSON line a query with its text, its positives, and its hardest negatives, best first.

    Candidates are the `depth` passages that score best for the query, without its relevant ones, itself, and those
    that score above `max_share` of its best positive: many of these are unjudged positives (positive-aware mining,
    NV-Retriever, arXiv 2407.15831). The file serves as a training source as it is.

    Args:
        dataset: the split to mine for.
        store: the embedded corpus, N passages of D dimensions.
        queries: float32 [Q, D], of `dataset.queries` in their order.
        out: the JSON lines file; written atomically.
        negatives: most negatives a query.
        depth: candidates a query, before any are dropped.
        max_share: of the best positive's score, above which a candidate is dropped.
        device: where the products are computed.
        progress: called with the rows of the corpus searched since the last call.

    Returns:
        Queries written, and how many of them got fewer than `negatives`.

    Raises:
        InputError: the qrels judge a passage that the store lacks.
    """
    ids = store.ids()
    row_of = rows_of(ids, dataset.judged | dataset.queries.keys())
    dataset.check(row_of)
    relevant = [[row_of[p] for p, grade in dataset.qrels[query].items() if grade > 0] for query in dataset.queries]
    scores, rows = exact.search(queries, store.shards(), ids, depth, device=device, progress=progress)
    best = _best_positive_scores(queries, relevant, store)
    limits = best - (1.0 - max_share) * np.abs(best)
    # A passage with the query's own id is the query itself (ArguAna).
    banned = [{*positives, row_of.get(query)} for query, positives in zip(dataset.queries, relevant, strict=True)]
    chosen = [
        [int(row) for row in found[score <= limit] if int(row) not in out_of_question][:negatives]
        for found, score, limit, out_of_question in zip(rows, scores, limits, banned, strict=True)
    ]
    texts = _texts(store, {row for group in (*relevant, *chosen) for row in group})
    short = written = 0
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for text, positives, found in zip(dataset.queries.values(), relevant, chosen, strict=True):
            if positives:
                line = {
                    "query": text,
                    "positive": [texts[row] for row in positives],
                    "negatives": [texts[row] for row in found],
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
                short += len(found) < negatives
    return written, short


def _best_positive_scores(queries: np.ndarray, relevant: list[list[int]], store: EmbeddingStore) -> np.ndarray:
    """The highest score among each query's positives, float32 [Q]; −inf without one."""
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    listed = [(query, row) for query, rows in enumerate(relevant) for row in rows]
    pairs = np.array(listed, dtype=np.int64).reshape(-1, 2)
    for first, vectors in store.shards():
        here = pairs[(pairs[:, 1] >= first) & (pairs[:, 1] < first + len(vectors))]
        products = np.einsum("pd,pd->p", queries[here[:, 0]], vectors[here[:, 1] - first].astype(np.float32))
        np.maximum.at(best, here[:, 0], products)
    return best


def _texts(store: EmbeddingStore, wanted: set[int]) -> dict[int, str]:
    return {row: passage.content for row, passage in enumerate(store.passages()) if row in wanted}
