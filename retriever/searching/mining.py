"""Hard negatives: for every query, passages that a model ranks high and that no judgement calls relevant."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
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


def mine_with_towers(
    towers: Towers,
    dataset: BeirDataset,
    out: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    embeddings: Path | None,
    negatives: int,
    depth: int,
    max_share: float,
    keep_identical_ids: bool = False,
) -> tuple[int, int]:
    """Embed corpus and queries, then `mine`. `embeddings` is the corpus's store; none for a temporary one."""
    # Before hours of encoding, not after.
    sought = dataset.judged | dataset.queries.keys()
    found = {passage.id for passage in dataset.passages() if passage.id in sought}
    dataset.check(found)
    own = sum(query in found and query not in dataset.qrels[query] for query in dataset.queries)
    if own and not keep_identical_ids:
        reporter.line(
            f"{dataset.name}: passages that are no negatives of a query because they have its id and are not judged "
            f"for it: {own:,} (--keep-identical-ids takes them)"
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
                negatives=negatives,
                depth=depth,
                max_share=max_share,
                device=str(towers.device),
                progress=advance,
                keys=keys,
                keep_identical_ids=keep_identical_ids,
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
    keys: np.ndarray | None = None,
    keep_identical_ids: bool = False,
) -> tuple[int, int]:
    """Write one JSON line a query with its text, its positives, and its hardest negatives, best first.

    Passages are compared by their text (title and text), not by their id, and queries likewise: texts that differ only
    in case or white space are the same. Candidates are the `depth` different texts that score best for the query,
    without empty ones, without the positives of any query of the same text, and without the passage that has the
    query's id, unless the qrels judge it. Of them, those that score above
    `max_share` of the best positive are dropped: many of these are unjudged positives (positive-aware mining,
    NV-Retriever, arXiv 2407.15831). A text that several passages have scores as the best of them. The file serves as a
    training source as it is; a query is not in it when all its positives are empty.

    Args:
        dataset: the split to mine for.
        store: the embedded corpus, N passages of D dimensions.
        queries: float32 [Q, D], of `dataset.queries` in their order.
        out: the JSON lines file; written atomically.
        negatives: most negatives a query.
        depth: candidates a query, before `max_share` drops any; at least `negatives` are looked at.
        max_share: of the best positive's score, above which a candidate is dropped.
        device: where the products are computed.
        progress: called with the rows of the corpus searched since the last call. Where copies leave a query too few
            candidates, the corpus is searched again for it.
        keys: what `text_keys` gives for the store; computed here when left out.
        keep_identical_ids: passages that have their query's id and are not judged for it are candidates too.

    Returns:
        Queries written, and how many of them got fewer than `negatives`.

    Raises:
        InputError: the store is damaged, or the qrels judge a passage that it lacks.
    """
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
    limits = best - (1.0 - max_share) * np.abs(np.where(np.isfinite(best), best, 0))
    banned = [
        keys[[*positives, *([] if keep_identical_ids else _own_passage(dataset, query, row_of))]]
        for query, positives in zip(dataset.queries, relevant, strict=True)
    ]

    def search(some: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return exact.search(some, store.shards(), ids, k, device=device, progress=progress)

    candidates = _candidates(search, queries, keys, banned, max(depth, negatives))
    chosen = [
        rows[scores <= limit][:negatives].tolist() for (scores, rows), limit in zip(candidates, limits, strict=True)
    ]
    texts = _texts(store, {row for group in (*own_positives, *chosen) for row in group})
    short = written = 0
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for text, positives, found in zip(dataset.queries.values(), own_positives, chosen, strict=True):
            positive_texts = list({_as_read(texts[row]): texts[row] for row in positives if texts[row]}.values())
            if positive_texts:
                line = {"query": text, "positive": positive_texts, "negatives": [texts[row] for row in found]}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
                short += len(found) < negatives
    return written, short


def text_keys(store: EmbeddingStore, progress: Callable[[int], None] | None = None) -> np.ndarray:
    """64 bits of a hash of every passage's text, uint64 [N]: texts that differ only in case and white space share one.

    Two of ten million different texts share a key once in 370,000 corpora, and then one candidate less is found.
    """
    keys = np.empty(store.rows, np.uint64)
    for row, passage in enumerate(store.passages()):
        keys[row] = _key(passage.content)
        if progress is not None:
            progress(1)
    return keys


def _as_read(text: str) -> str:
    # Training reads U+FFFD for NUL.
    return text.replace("\0", "\ufffd")


def _key(text: str) -> int:
    content = folded(_as_read(text)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _shared_by_text(queries: Sequence[str], positives: Sequence[list[int]]) -> list[list[int]]:
    """For each query, the rows of the positives of all queries that have its text."""
    by_text: dict[str, list[int]] = {}
    for query, rows in zip(queries, positives, strict=True):
        by_text.setdefault(folded(query), []).extend(rows)
    shared = {text: list(dict.fromkeys(rows)) for text, rows in by_text.items()}
    return [shared[folded(query)] for query in queries]


def _own_passage(dataset: BeirDataset, query: str, row_of: dict[str, int]) -> list[int]:
    """The row of the passage that is the query itself (ArguAna): it has its id, and the qrels do not judge the pair."""
    return [row_of[query]] if query in row_of and query not in dataset.qrels[query] else []


def _candidates(
    search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    queries: np.ndarray,
    keys: np.ndarray,
    banned: Sequence[np.ndarray],
    depth: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each query, scores and rows of its best `depth` passages, fewer when the corpus has no more.

    Args:
        search: (queries [M, D], k) -> scores and rows [M, min(k, N)], best first.
        queries: [Q, D].
        keys: [N] of the passages' texts. Of those with equal keys only the best is taken.
        banned: for each query, the keys of texts that are not taken; the empty text never is.
        depth: how many, at least 1.
    """
    empty = np.array([_key("")], np.uint64)
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0, np.int64))] * len(queries)
    asked = depth + max(map(len, banned), default=0) + 1
    left = np.arange(len(queries))
    while len(left):
        unfinished = []
        for query, scores, rows in zip(left.tolist(), *search(queries[left], min(asked, len(keys))), strict=True):
            texts = keys[rows]
            is_first = np.zeros(len(rows), bool)
            is_first[np.unique(texts, return_index=True)[1]] = True
            taken = np.flatnonzero(is_first & ~np.isin(texts, np.concatenate([banned[query], empty])))[:depth]
            found[query] = scores[taken], rows[taken]
            if len(taken) < depth and asked < len(keys):
                unfinished.append(query)
        left = np.array(unfinished, np.int64)
        asked *= 2
    return found


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
