"""BM25's run of a data set, kept on disk and used again as long as nothing that it depends on has changed."""

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
    """BM25's run, k passages a query, from FOLDER/BM25.trec if it is this one; else made and written there.

    FOLDER/BM25.json says what it was made of. Passages that have their query's id and are not judged for it are left
    out, unless `keep_identical_ids`. A line warns where most queries find nothing.
    """
    run = _kept_or_made(dataset, folder, k, reporter, stopwords, keep_identical_ids)
    lost = int((run.rows < 0).all(axis=1).sum())
    if 2 * lost > len(run.queries):
        reporter.line(
            f"warning: {dataset.name}: BM25 finds nothing for {lost:,} of {len(run.queries):,} queries: none of their "
            "words, stop words aside, is in the corpus"
        )
    return run


def _kept_or_made(
    dataset: BeirDataset, folder: Path, k: int, reporter: Reporter, stopwords: str | None, keep_identical_ids: bool
) -> RankedRun:
    run_path, made_path = folder / f"{BM25}.trec", folder / f"{BM25}.json"
    made = {
        "corpus sha256": sha256_file(dataset.corpus_file),
        "queries sha256": sha256_file(beir_file(dataset.folder, "queries.jsonl")),
        "qrels sha256": sha256_file(beir_file(dataset.folder, f"qrels/{dataset.split}.tsv")),
        **bm25_details(stopwords),
        "passages a query": k,
        "identical ids": "kept" if keep_identical_ids else "left out where not judged",
    }
    left_out = _left_out_of_kept(made_path, made, run_path)
    if left_out is not None:
        # A query that matched nothing has no line in the file.
        found = read_trec_run(run_path)
        run = RankedRun.of({query: found.get(query, {}) for query in dataset.queries})
        run.left_out = left_out
        return run
    with reporter.bar(f"{dataset.name}: {BM25}", len(dataset.queries), "queries") as advance:
        # One more than is kept, for a passage that is left out.
        found = bm25_run(dataset.passages(), dataset.queries, k + 1, stopwords=stopwords, progress=advance)
        run = found.cut(k) if keep_identical_ids else without_identical_ids(found, dataset.qrels, k)
    write_trec_run(run_path, run, BM25)
    write_json(made_path, {**made, LEFT_OUT: run.left_out, "run sha256": sha256_file(run_path)})
    return run


def bm25_details(stopwords: str | None = "en") -> dict[str, Any]:
    """How BM25 is computed.

    Raises:
        InputError: bm25s is not installed, or has no stop words of that language.
    """
    made_by = import_bm25s(stopwords).__version__
    dropped = f"stop words of {stopwords} dropped" if stopwords else "no stop words dropped"
    tokens = f"words of two letters or more, Han and Hiragana by character; {dropped}; no stemming"
    return {"formula": "Lucene's", "k1": K1, "b": B, "tokens": tokens, "bm25s": made_by}


def _left_out_of_kept(path: Path, made: dict[str, Any], run: Path) -> int | None:
    """How many passages were left out of the run on disk; none where there is no run, or another one."""
    if not run.is_file():
        return None
    try:
        found = read_json(path)
    except InputError:
        return None
    left_out = found.get(LEFT_OUT) if isinstance(found, dict) else None
    if not isinstance(left_out, int) or found != {**made, LEFT_OUT: left_out, "run sha256": sha256_file(run)}:
        return None
    return left_out
