"""BM25's run of a data set, kept on disk and used again as long as nothing that it depends on has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eval.bm25 import K1, B, bm25_run, bm25s_with
from eval.ranking import RankedRun, rows_of
from eval.runs import read_trec_run, write_trec_run
from index.beir import BeirDataset, beir_file
from index.files import InputError, read_json, sha256_file, write_json
from retriever.progress import Terminal

BM25 = "BM25"


def kept_bm25_run(
    dataset: BeirDataset, folder: Path, k: int, terminal: Terminal, stopwords: str | None = "en"
) -> RankedRun:
    """BM25's run, k passages a query, from FOLDER/BM25.trec if it is this one; else made and written there.

    FOLDER/BM25.json says what it was made of. Passages that are their own query are left out. A line warns where most
    queries find nothing.
    """
    run = _kept_or_made(dataset, folder, k, terminal, stopwords)
    lost = int((run.rows < 0).all(axis=1).sum())
    if 2 * lost > len(run.queries):
        terminal.line(
            f"warning: {dataset.name}: BM25 finds nothing for {lost:,} of {len(run.queries):,} queries: none of their "
            "words, stop words aside, is in the corpus"
        )
    return run


def _kept_or_made(dataset: BeirDataset, folder: Path, k: int, terminal: Terminal, stopwords: str | None) -> RankedRun:
    run_path, made_path = folder / f"{BM25}.trec", folder / f"{BM25}.json"
    made = {
        "corpus sha256": sha256_file(dataset.corpus_file),
        "queries sha256": sha256_file(beir_file(dataset.folder, "queries.jsonl")),
        "qrels sha256": sha256_file(beir_file(dataset.folder, f"qrels/{dataset.split}.tsv")),
        **bm25_details(stopwords),
        "passages a query": k,
    }
    if run_path.is_file() and _same(made_path, made, run_path):
        # A query that matched nothing has no line in the file.
        found = read_trec_run(run_path)
        return RankedRun.of({query: found.get(query, {}) for query in dataset.queries})
    with terminal.bar(f"{dataset.name}: {BM25}", len(dataset.queries), "queries") as advance:
        # One more than is kept, for a passage that is its own query.
        found = bm25_run(dataset.passages(), dataset.queries, k + 1, stopwords=stopwords, progress=advance)
        run = without_own(found, k)
    write_trec_run(run_path, run, BM25)
    write_json(made_path, {**made, "run sha256": sha256_file(run_path)})
    return run


def bm25_details(stopwords: str | None = "en") -> dict[str, Any]:
    """How BM25 is computed.

    Raises:
        InputError: bm25s is not installed, or has no stop words of that language.
    """
    made_by = bm25s_with(stopwords).__version__
    dropped = f"stop words of {stopwords} dropped" if stopwords else "no stop words dropped"
    tokens = f"words of two letters or more, Han and Hiragana by character; {dropped}; no stemming"
    return {"formula": "Lucene's", "k1": K1, "b": B, "tokens": tokens, "bm25s": made_by}


def without_own(run: RankedRun, k: int | None) -> RankedRun:
    """The run without the passages whose id is their query's, cut to k."""
    row_of = rows_of(run.passages, set(run.queries))
    return run.without(np.array([row_of.get(query, -1) for query in run.queries], dtype=np.int64), k)


def _same(path: Path, made: dict[str, Any], run: Path) -> bool:
    try:
        return bool(read_json(path) == {**made, "run sha256": sha256_file(run)})
    except InputError:
        return False
