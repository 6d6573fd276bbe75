"""`retriever evaluate compare` and `retriever evaluate run`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from index.progress import Reporter
from retriever.cli.commands.common import Switch, check_counts


@dataclass(frozen=True, kw_only=True)
class EvaluateCompare:
    """Compare runs query by query, on one or more BEIR folders: who is better, by more than chance, and on which
    queries. Writes one report as HTML, Markdown and JSON."""

    systems: Positional[tuple[str, ...]]
    """Reports of `retriever evaluate beir` (folders) or TREC run files, each as PATH or NAME=PATH."""
    data: tuple[str, ...]
    """BEIR folders, folders of them, names of BEIR's sets (scifact …), or beir for all of them."""
    out: Path
    """Folder of the report."""
    home: Path | None = None
    """Where sets lie that --data names."""
    split: str | None = None
    """Which qrels; empty: test, and dev of MS MARCO."""
    title: str = ""
    """Of the report; empty: the names of the sets."""
    allow_dangling: Switch = False
    """Go on where qrels judge queries that are not there (score 0)."""
    keep_identical_ids: Switch = False
    """Rank passages that have their query's id and are not judged for it; BEIR leaves them out, trec_eval does not."""
    bm25: Switch = False
    """Add BM25 over the same corpus."""
    bm25_stopwords: str = "en"
    """Language whose stop words BM25 drops, as bm25s names it: en, de, fr, zh …; or none."""
    fuse: tuple[str, ...] = ()
    """Add hybrids: names joined by +, as in MiniLM+BM25."""
    method: Literal["rrf", "minmax", "zscore"] = "rrf"
    """How hybrids are fused: by reciprocal ranks, or by scores brought to 0 … 1 or to mean 0 and deviation 1."""
    weights: tuple[float, ...] = ()
    """Of a hybrid's parts; empty: equal."""
    measure: str | None = None
    """What systems are compared by: ndcg, map, recall, precision, mrr, rcap or success @ 1 … 1000; empty: ndcg@10. A
    run that is not that deep is scored by what it has."""
    baseline: str | None = None
    """Test the others against this system only; empty: every pair."""
    k: int = 1000
    """Passages a query that are scored; also what BM25 and hybrids return at most."""
    permutations: int = 100_000
    """Sign patterns of the randomisation test; all there are, where they are fewer."""
    seed: int = 0
    """Of the randomisation test."""
    changed: int = 4
    """Queries to show that a system does better than the first, and as many that it does worse."""
    json: Switch = False
    """Print the answer as JSON."""

    def __post_init__(self) -> None:
        check_counts(self, "k", "permutations")
        if not self.data:
            raise ValueError("--data: expected at least one BEIR folder, found none")
        if not self.systems and not self.bm25:
            raise ValueError("systems: expected at least one report or run file, or --bm25, found none")
        if self.changed < 0 or self.seed < 0:
            raise ValueError("--changed, --seed: expected 0 or more")
        for names in self.fuse:
            parts = names.split("+")
            if len(parts) < 2 or not all(parts):
                raise ValueError(f"--fuse: expected names joined by +, found {names!r}")
            if self.weights and len(self.weights) != len(parts):
                raise ValueError(f"--weights: expected {len(parts)} for {names}, found {len(self.weights)}")
        if self.weights:
            from eval.fusion import WEIGHTS, are_weights

            if not are_weights(self.weights):
                raise ValueError(f"--weights: expected {WEIGHTS}, found {' '.join(map(str, self.weights))}")

    def run(self, reporter: Reporter) -> int:
        from eval.reports.comparison import Fusion, Request, compare_to_report, named_systems
        from eval.reports.files import json_of
        from eval.reports.markdown import summary_of
        from retriever.utils.versions import versions

        request = Request(
            systems=named_systems(self.systems),
            data=self.data,
            home=self.home,
            split=self.split,
            title=self.title,
            dangling=self.allow_dangling,
            keep_identical_ids=self.keep_identical_ids,
            bm25=self.bm25,
            stopwords=None if self.bm25_stopwords == "none" else self.bm25_stopwords,
            fusions=[Fusion(tuple(names.split("+")), self.method, self.weights) for names in self.fuse],
            measure=self.measure,
            baseline=self.baseline,
            k=self.k,
            permutations=self.permutations,
            seed=self.seed,
            changed=self.changed,
        )
        report = compare_to_report(request, self.out, reporter, versions("numpy", "scipy"))
        if self.json:
            print(json.dumps(json_of(report), ensure_ascii=False))
        else:
            print(summary_of(report), end="")
            reporter.line(f"report: {self.out / 'report.html'}")
        return 0


@dataclass(frozen=True, kw_only=True)
class EvaluateRun(EvaluateCompare):
    """Score TREC run files of any program on a BEIR folder; several are compared as by `retriever evaluate compare`."""
