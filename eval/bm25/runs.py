"""BM25 runs cached on disk; a cached run is reused while its data and parameters are unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.bm25.search import K1, B, bm25_run, import_bm25s
from eval.ranking import RankedRun, without_identical_ids
from eval.runs import read_trec_run, write_trec_run
from index.beir import BeirDataset, beir_file
from index.files import InputError, read_json, sha256_file, write_json
from index.progress import Reporter

BM25 = "BM25"
"""Name of the system in reports and of its files."""

LEFT_OUT = "identical ids left out"


def cached_bm25_run(
    dataset: BeirDataset,
    folder: Path,
    k: int,
    reporter: Reporter,
    stopwords: str | None = "en",
    *,
    keep_identical_ids: bool = False,
) -> RankedRun:
    """Return the BM25 run of a split, from FOLDER/BM25.trec if that file is up to date.

    Otherwise the run is computed and written there, and FOLDER/BM25.json states its data and parameters. A warning is
    printed if most queries match no passage.

    Args:
        dataset: the split.
        folder: the folder of the cache.
        k: passages per query.
        reporter: shows progress and the warning.
        stopwords: language of the stop words to remove, or None to remove none.
        keep_identical_ids: keep passages that have the id of their query and are not judged for it.

    Raises:
        InputError: bm25s is not installed or lacks stop words for the language, or the corpus is empty.
    """
    run = _read_or_compute(dataset, folder, k, reporter, stopwords, keep_identical_ids)
    empty = int((run.rows < 0).all(axis=1).sum())
    if 2 * empty > len(run.queries):
        reporter.line(
            f"warning: {dataset.name}: BM25 finds nothing for {empty:,} of {len(run.queries):,} queries: none of their "
            "words, except stop words, is in the corpus"
        )
    return run


def _read_or_compute(
    dataset: BeirDataset, folder: Path, k: int, reporter: Reporter, stopwords: str | None, keep_identical_ids: bool
) -> RankedRun:
    run_path, details_path = folder / f"{BM25}.trec", folder / f"{BM25}.json"
    details = {
        "corpus sha256": sha256_file(dataset.corpus_file),
        "queries sha256": sha256_file(beir_file(dataset.folder, "queries.jsonl")),
        "qrels sha256": sha256_file(beir_file(dataset.folder, f"qrels/{dataset.split}.tsv")),
        **bm25_details(stopwords),
        "passages a query": k,
        "identical ids": "kept" if keep_identical_ids else "left out where not judged",
    }
    left_out = _cached_left_out(details_path, details, run_path)
    if left_out is not None:
        # A query that matches no passage has no line in the file.
        cached = read_trec_run(run_path)
        run = RankedRun.of({query: cached.get(query, {}) for query in dataset.queries})
        run.left_out = left_out
        return run
    with reporter.bar(f"{dataset.name}: {BM25}", len(dataset.queries), "queries") as advance:
        # One more, so that k passages remain after the removal of an identical id.
        run = bm25_run(dataset.passages(), dataset.queries, k + 1, stopwords=stopwords, progress=advance)
        run = run.cut(k) if keep_identical_ids else without_identical_ids(run, dataset.qrels, k)
    write_trec_run(run_path, run, BM25)
    write_json(details_path, {**details, LEFT_OUT: run.left_out, "run sha256": sha256_file(run_path)})
    return run


def bm25_details(stopwords: str | None = "en") -> dict[str, Any]:
    """The parameters of BM25, for reports and the cache.

    Raises:
        InputError: bm25s is not installed or lacks stop words for the language.
    """
    version = import_bm25s(stopwords).__version__
    dropped = f"stop words of {stopwords} dropped" if stopwords else "no stop words dropped"
    tokens = f"words of two letters or more, Han and Hiragana by character; {dropped}; no stemming"
    return {"formula": "Lucene's", "k1": K1, "b": B, "tokens": tokens, "bm25s": version}


def _cached_left_out(path: Path, details: dict[str, Any], run: Path) -> int | None:
    """The number of passages left out of the cached run; None if there is no run or it is out of date."""
    if not run.is_file():
        return None
    try:
        cached = read_json(path)
    except InputError:
        return None
    left_out = cached.get(LEFT_OUT) if isinstance(cached, dict) else None
    if not isinstance(left_out, int) or cached != {**details, LEFT_OUT: left_out, "run sha256": sha256_file(run)}:
        return None
    return left_out
