"""Mining of hard negatives: passages that a model ranks high for a query and that are not judged relevant."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.ranking import rows_of
from index.beir import BeirDataset
from index.exact import search as exact
from index.files import atomic_path
from index.passages import folded
from index.progress import Reporter
from index.store.reader import EmbeddingStore
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.files import embed_corpus, embed_queries
from retriever.models.towers import Towers


@dataclass(frozen=True)
class MiningOptions:
    """Which passages are taken as hard negatives."""

    negatives: int = 7
    """Maximum number of negatives per query."""
    depth: int = 100
    """Candidates per query, before `max_share` drops any; at least `negatives` are considered."""
    max_share: float = 0.95
    """Candidates that score above this share of the best positive's score are dropped, 0 to 1."""
    keep_identical_ids: bool = False
    """Whether passages that have the id of their query and are not judged for it are candidates."""


def mine_with_towers(
    towers: Towers,
    dataset: BeirDataset,
    out: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    mining: MiningOptions | None = None,
    embeddings: Path | None = None,
) -> tuple[int, int]:
    """Embed the corpus and the queries of a split, then `mine`.

    Args:
        towers: the model in evaluation mode, on the device to use.
        dataset: the split.
        out: the JSON lines file to write.
        options: precision and micro-batch size.
        reporter: shows progress.
        mining: which negatives are taken. Default: None, the defaults of MiningOptions.
        embeddings: the folder of the corpus's store, which is continued or reused if it exists. Default: None, a
            temporary folder.

    Returns:
        See `mine`.

    Raises:
        InputError: the data are invalid, or `embeddings` holds something else.
    """
    mining = mining or MiningOptions()
    # The qrels are checked before hours of encoding.
    relevant_ids = dataset.judged | dataset.queries.keys()
    existing = {passage.id for passage in dataset.passages() if passage.id in relevant_ids}
    dataset.check(existing)
    identical = sum(query in existing and query not in dataset.qrels[query] for query in dataset.queries)
    if identical and not mining.keep_identical_ids:
        reporter.line(
            f"{dataset.name}: passages that are not taken as negatives because they have the id of the query and are "
            f"not judged for it: {identical:,} (--keep-identical-ids takes them)"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = embeddings or Path(temporary) / "embeddings"
        store = embed_corpus(towers, dataset.corpus_file, folder, options, reporter)
        queries = embed_queries(towers, list(dataset.queries.values()), options, reporter)
        with reporter.bar("read texts", store.rows, "passages") as advance:
            keys = text_keys(store, advance)
        with reporter.bar("search", store.rows, "passages") as advance:
            return mine(
                dataset,
                store=store,
                queries=queries,
                out=out,
                options=mining,
                device=str(towers.device),
                progress=advance,
                keys=keys,
            )


def mine(
    dataset: BeirDataset,
    *,
    store: EmbeddingStore,
    queries: np.ndarray,
    out: Path,
    options: MiningOptions | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    keys: np.ndarray | None = None,
) -> tuple[int, int]:
    """Write one JSON line per query with its text, its positives and its hard negatives, hardest first.

    The candidates of a query are the `depth` distinct texts that score highest for it. Texts (title and text) that
    differ only in case or white space are the same text, which scores as the best of its passages. Empty texts,
    positives of any query with the same text, and an unjudged passage with the id of the query are not candidates.
    Candidates that score above `max_share` of the best positive are dropped, because many of them are unjudged
    positives (positive-aware mining, NV-Retriever, arXiv 2407.15831).

    The file can be used as a training source. A query whose positives are all empty is left out.

    Args:
        dataset: the split.
        store: the embedded corpus of N passages [N, D].
        queries: embeddings of `dataset.queries`, in their order, float32 [Q, D].
        out: the JSON lines file; written atomically.
        options: which negatives are taken. Default: None, the defaults of MiningOptions.
        device: where the products are computed, "cpu" or "cuda".
        progress: called with the number of corpus rows searched since the last call. If duplicates leave a query too
            few candidates, the corpus is searched again for it.
        keys: the result of `text_keys` for the store. Default: None, computed here.

    Returns:
        The number of queries written, and the number of them with fewer than `negatives` negatives.

    Raises:
        InputError: the store is damaged, or the qrels judge a passage that it lacks.
    """
    options = options or MiningOptions()
    store.check()
    ids = store.ids()
    row_of = rows_of(ids, dataset.judged | dataset.queries.keys())
    dataset.check(row_of)
    keys = text_keys(store) if keys is None else keys
    own_positives = [
        [row_of[passage] for passage, grade in dataset.qrels[query].items() if grade > 0 and passage in row_of]
        for query in dataset.queries
    ]
    relevant = _shared_by_text(list(dataset.queries.values()), own_positives)
    best = _best_positive_scores(queries, relevant, store)
    limits = best - (1.0 - options.max_share) * np.abs(np.where(np.isfinite(best), best, 0))
    excluded = [
        keys[[*positives, *([] if options.keep_identical_ids else _identical_id(dataset, query, row_of))]]
        for query, positives in zip(dataset.queries, relevant, strict=True)
    ]

    def search(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return exact.search(vectors, store.shards(), ids, k, device=device, progress=progress)

    candidates = _candidates(search, queries, keys, excluded, max(options.depth, options.negatives))
    negatives = [
        rows[scores <= limit][: options.negatives].tolist()
        for (scores, rows), limit in zip(candidates, limits, strict=True)
    ]
    texts = _texts(store, {row for group in (*own_positives, *negatives) for row in group})
    short = written = 0
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for text, positives, own in zip(dataset.queries.values(), own_positives, negatives, strict=True):
            positive_texts = list({_as_read(texts[row]): texts[row] for row in positives if texts[row]}.values())
            if positive_texts:
                line = {"query": text, "positive": positive_texts, "negatives": [texts[row] for row in own]}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
                short += len(own) < options.negatives
    return written, short


def text_keys(store: EmbeddingStore, progress: Callable[[int], None] | None = None) -> np.ndarray:
    """Hash the text of every passage to 64 bits, uint64 [N]; texts that differ only in case and white space are equal.

    A collision costs one candidate. In a corpus of ten million texts it happens with probability 1 in 370,000.

    Args:
        store: the embedded corpus.
        progress: called with the number of passages read since the last call.
    """
    keys = np.empty(store.rows, np.uint64)
    for row, passage in enumerate(store.passages()):
        keys[row] = _key(passage.content)
        if progress is not None:
            progress(1)
    return keys


def _as_read(text: str) -> str:
    # Training replaces NUL by U+FFFD.
    return text.replace("\0", "\ufffd")


def _key(text: str) -> int:
    content = folded(_as_read(text)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _shared_by_text(queries: Sequence[str], positives: Sequence[list[int]]) -> list[list[int]]:
    """For each query, the rows of the positives of all queries with the same text."""
    by_text: dict[str, list[int]] = {}
    for query, rows in zip(queries, positives, strict=True):
        by_text.setdefault(folded(query), []).extend(rows)
    shared = {text: list(dict.fromkeys(rows)) for text, rows in by_text.items()}
    return [shared[folded(query)] for query in queries]


def _identical_id(dataset: BeirDataset, query: str, row_of: dict[str, int]) -> list[int]:
    """The row of the unjudged passage with the id of the query, if any; in ArguAna it is the query itself."""
    return [row_of[query]] if query in row_of and query not in dataset.qrels[query] else []


def _candidates(
    search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    queries: np.ndarray,
    keys: np.ndarray,
    excluded: Sequence[np.ndarray],
    depth: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each query, the scores and rows of its best `depth` passages with distinct texts, if there are as many.

    Args:
        search: (queries [M, D], k) -> scores and rows [M, min(k, N)], best first.
        queries: [Q, D].
        keys: [N], the keys of the passages' texts. Only the best passage with the same key is taken.
        excluded: for each query, the keys of texts that are not taken; the empty text is never taken.
        depth: number of candidates, at least 1.
    """
    empty = np.array([_key("")], np.uint64)
    candidates: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0, np.int64))] * len(queries)
    k = depth + max(map(len, excluded), default=0) + 1
    remaining = np.arange(len(queries))
    while len(remaining):
        unfinished = []
        for query, scores, rows in zip(remaining.tolist(), *search(queries[remaining], min(k, len(keys))), strict=True):
            texts = keys[rows]
            is_first = np.zeros(len(rows), bool)
            is_first[np.unique(texts, return_index=True)[1]] = True
            taken = np.flatnonzero(is_first & ~np.isin(texts, np.concatenate([excluded[query], empty])))[:depth]
            candidates[query] = scores[taken], rows[taken]
            if len(taken) < depth and k < len(keys):
                unfinished.append(query)
        remaining = np.array(unfinished, np.int64)
        k *= 2
    return candidates


def _best_positive_scores(queries: np.ndarray, relevant: list[list[int]], store: EmbeddingStore) -> np.ndarray:
    """The highest score of each query's positives, float32 [Q]; −inf without a positive."""
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    pairs = np.array([(query, row) for query, rows in enumerate(relevant) for row in rows], np.int64).reshape(-1, 2)
    for first, vectors in store.shards():
        in_shard = pairs[(pairs[:, 1] >= first) & (pairs[:, 1] < first + len(vectors))]
        products = np.einsum("pd,pd->p", queries[in_shard[:, 0]], vectors[in_shard[:, 1] - first].astype(np.float32))
        np.maximum.at(best, in_shard[:, 0], products)
    return best


def _texts(store: EmbeddingStore, wanted: set[int]) -> dict[int, str]:
    return {row: passage.content for row, passage in enumerate(store.passages()) if row in wanted}
