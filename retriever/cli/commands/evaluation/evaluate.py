"""`retriever evaluate beir`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from index.progress import Reporter
from retriever.cli.commands.common import IndexDevice, Switch, TruncatedEmbedding
from retriever.utils.torchrun import rank

if TYPE_CHECKING:
    from eval.reports.suite import SuiteResult


@dataclass(frozen=True, kw_only=True)
class EvaluateBeir(IndexDevice, TruncatedEmbedding):
    """Score a model on BEIR sets: nDCG, MAP, recall, precision, MRR, capped recall and success.

    Writes run files and a report. The sets are checked first. Under torchrun all processes share the work.
    """

    data: tuple[str, ...]
    """BEIR folders, folders of them, names of BEIR's sets (scifact …), or beir for all of them; nanobeir or
    NanoSciFact …; ir:NAME for a set of ir_datasets (ir:beir/scifact/test)."""
    out: Path
    """Folder of the report; embeddings found there are reused."""
    split: str | None = None
    """Split of the qrels. None: test, and dev for MS MARCO."""
    k: int = 1000
    """Number of passages per query in the run, and the deepest cut-off of the measures."""
    home: Path | None = None
    """Folder of the sets that --data names."""
    download: Switch = False
    """Download public sets that --data names to --home; those of BEIR are checked against its checksums."""
    mirror: str | None = None
    """Address to download from. None: BEIR's own."""
    preflight: Switch = False
    """Only check the sets and report errors, warnings, lengths, and an estimate of time, memory and disk."""
    allow_dangling: Switch = False
    """Accept qrels with passages or queries that do not exist. Such passages count as not found, such queries as 0."""
    keep_identical_ids: Switch = False
    """Rank passages that have their query's id and are not judged for it. BEIR leaves them out, trec_eval does not."""
    settings: Path | None = None
    """YAML file with prompts and maximum lengths by set (query_prompt, passage_prompt, query_max_length,
    passage_max_length), under the name of the set or under default."""
    windows: Switch = False
    """Score long documents by their best window, instead of truncating them at the model's maximum length."""
    overlap: int = 32
    """Tokens that consecutive windows share."""
    factory: str | None = None
    """Also build and evaluate a FAISS index with this factory string (auto, IVF1024,Flat …)."""
    index: Path | None = None
    """Also evaluate this index, which must be of the same corpus and model."""
    dtype: Literal["float32", "float16", "int8", "binary"] = "float32"
    """Dtype of the embeddings on disk."""
    shard_rows: int = 65536
    """Passages per shard; at most this many per process are lost if a run is killed."""
    dims: tuple[int, ...] = ()
    """Also give the metrics with embeddings truncated to each of these dimensions, in one table and plot."""
    precisions: tuple[Literal["int8", "binary", "binary+int8"], ...] = ()
    """Also give the metrics with passages in int8, binary (1 bit per value), or binary+int8 (the 4 k nearest by Hamming
    distance, ranked by int8), in the same table."""

    def run(self, reporter: Reporter) -> int:
        from retriever.evaluation.evaluate import evaluate

        found = evaluate(
            self.model,
            self.data,
            out=self.out,
            split=self.split,
            k=self.k,
            home=self.home,
            download=self.download,
            mirror=self.mirror,
            allow_dangling=self.allow_dangling,
            keep_identical_ids=self.keep_identical_ids,
            settings=self.settings,
            windows=self.windows,
            overlap=self.overlap,
            factory=self.factory,
            index=self.index,
            dtype=self.dtype,
            shard_rows=self.shard_rows,
            dims=self.dims,
            precisions=self.precisions,
            preflight=self.preflight,
            **self.embedding_options(),
            **self.index_options(),
            progress=reporter,
        )
        if rank() != 0:
            return 0
        if found.result is None:
            if self.json:
                print(json.dumps({"sets": found.checks, "absent": found.absent}))
        elif self.json:
            print(json.dumps(found.result.as_json()))
        else:
            _print_tables(found.result)
            reporter.line(f"report: {self.out / 'report.md'}")
        return 0


def _print_tables(found: SuiteResult) -> None:
    from eval.approximate import approximation_table
    from eval.reports.markdown import comparison_table, size_table
    from eval.sets.plan import suite_table

    print(comparison_table(found.rows, head="data"), end="")
    if found.approximations:
        print("\n" + approximation_table(found.exact, found.approximations, found.measure), end="")
    if found.sizes:
        print("\n" + size_table(found.sizes, found.measure), end="")
    if found.absent or len(found.rows) > 1:
        print("\n" + suite_table(found.rows, found.absent, found.measure), end="")
