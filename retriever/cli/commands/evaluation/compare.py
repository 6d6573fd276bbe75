"""`retriever evaluate compare` and `retriever evaluate run`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from index.progress import Reporter
from retriever.cli.commands.common import Switch


@dataclass(frozen=True, kw_only=True)
class EvaluateCompare:
    """Compare runs query by query on BEIR sets: which system is better, whether significantly, and on which queries.

    Writes one report as HTML, Markdown and JSON.
    """

    systems: Positional[tuple[str, ...]]
    """Reports of `retriever evaluate beir` (folders) or TREC run files, each as PATH or NAME=PATH."""
    data: tuple[str, ...]
    """BEIR folders, folders of them, names of BEIR's sets (scifact …), or beir for all of them."""
    out: Path
    """Folder of the report."""
    home: Path | None = None
    """Folder of the sets that --data names."""
    split: str | None = None
    """Split of the qrels. None: test, and dev for MS MARCO."""
    title: str = ""
    """Title of the report. Empty: the names of the sets."""
    allow_dangling: Switch = False
    """Accept qrels with queries that do not exist, which count as 0."""
    keep_identical_ids: Switch = False
    """Rank passages that have their query's id and are not judged for it. BEIR leaves them out, trec_eval does not."""
    bm25: Switch = False
    """Add BM25 over the same corpus."""
    bm25_stopwords: str = "en"
    """Language of BM25's stop words, as bm25s names it: en, de, fr, zh …; or none."""
    fuse: tuple[str, ...] = ()
    """Hybrids to add: names joined by +, for example MiniLM+BM25."""
    method: Literal["rrf", "minmax", "zscore"] = "rrf"
    """How the runs of a hybrid are fused. rrf: by reciprocal ranks. minmax, zscore: by normalized scores."""
    weights: tuple[float, ...] = ()
    """Weights of a hybrid's parts. Empty: equal."""
    measure: str | None = None
    """Measure of the comparison, NAME@CUTOFF: ndcg, map, recall, precision, mrr, rcap (capped recall) or success, at a
    cut-off from 1 to 1000. None: ndcg@10. The cut-off may be deeper than a run."""
    baseline: str | None = None
    """Test all other systems against this one only. None: test every pair."""
    k: int = 1000
    """Number of passages per query that are scored, and maximum number that BM25 and hybrids return."""
    permutations: int = 100_000
    """Number of random sign patterns of the randomization test. If there are fewer patterns, all are used."""
    seed: int = 0
    """Seed of the randomization test."""
    changed: int = 4
    """Number of queries to show on which a system is better than the first one, and the same number on which it is
    worse."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self, reporter: Reporter) -> int:
        from eval.reports.files import json_of
        from eval.reports.markdown import summary_of
        from retriever.evaluation.compare_runs import compare

        report = compare(
            self.systems,
            self.data,
            out=self.out,
            home=self.home,
            split=self.split,
            title=self.title,
            allow_dangling=self.allow_dangling,
            keep_identical_ids=self.keep_identical_ids,
            bm25=self.bm25,
            bm25_stopwords=None if self.bm25_stopwords == "none" else self.bm25_stopwords,
            fuse=self.fuse,
            method=self.method,
            weights=self.weights,
            measure=self.measure,
            baseline=self.baseline,
            k=self.k,
            permutations=self.permutations,
            seed=self.seed,
            changed=self.changed,
            progress=reporter,
        ).report
        if self.json:
            print(json.dumps(json_of(report), ensure_ascii=False))
        else:
            print(summary_of(report), end="")
            reporter.line(f"report: {self.out / 'report.html'}")
        return 0


@dataclass(frozen=True, kw_only=True)
class EvaluateRun(EvaluateCompare):
    """Score TREC run files of any program on a BEIR folder; several are compared as by `retriever evaluate compare`."""
