"""`retriever index build` and `retriever index tune`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from index.progress import Reporter
from retriever.cli.commands.common import Switch, answer
from retriever.errors import ArgumentError
from retriever.utils.torchrun import rank

if TYPE_CHECKING:
    from index.ann.tuning.result import Tuning


@dataclass(frozen=True, kw_only=True)
class RecallTarget:
    """How the recall of an index is measured."""

    k: int = 10
    """Number of passages per query at which the recall is measured."""
    queries: Path | None = None
    """File of real queries to measure with (.jsonl, .csv, .tsv, .parquet), together with --model. None: passages."""
    model: str | None = None
    """Model folder or hub name that embeds --queries."""
    held_out: int = 2000
    """Number of passages to measure with if there are no queries; they are left out of the training sample."""

    def query_texts(self) -> list[str] | None:
        """The texts of --queries."""
        if (self.queries is None) != (self.model is None):
            raise ArgumentError("queries", "expected together with --model, the one that embedded the passages")
        if self.queries is None:
            return None
        from index.beir import read_queries

        return list(read_queries(self.queries).values())


@dataclass(frozen=True, kw_only=True)
class IndexBuild(RecallTarget):
    """Build a FAISS index of an embedding store. Under torchrun the processes build it together, in parts."""

    embeddings: Path
    """Folder of `retriever encode`."""
    out: Path
    """Folder of the index."""
    factory: str = "auto"
    """FAISS factory string (Flat, SQfp16, IVF1024,Flat, HNSW32, OPQ32,IVF1024,PQ32x4fs …), or CAGRA64, a graph that a
    GPU builds and searches (needs faiss-gpu-cuvs). auto: chosen by size, memory budget and whether the embeddings have
    unit length; the reason is reported."""
    memory_budget_mib: float | None = None
    """Maximum memory of the index in MiB; with --on-disk, maximum memory while building."""
    target_recall: float | None = None
    """Find the cheapest search settings that reach this recall. The exit code is 1 if no settings reach it."""
    part: str = "1/1"
    """Build only one part of the embeddings, for example 2/8; the parts are merged later."""
    train_from: Path | None = None
    """Index whose trained quantizers are reused, so that the two indexes can be merged."""
    on_disk: Switch = False
    """Leave the inverted lists on disk, for indexes larger than memory."""
    gpu: Switch = False
    """Train, fill and measure the recall of the index on all GPUs (needs a faiss for GPUs). With faiss-gpu-cuvs, HNSW…
    graphs are built there, too."""
    seed: int = 0
    """Seed of the training sample."""
    dim: int | None = None
    """Index only the first values of each embedding, scaled to unit length, for a model trained with loss.matryoshka.
    None: all values."""
    json: Switch = False
    """Print the summary as JSON."""

    def run(self, reporter: Reporter) -> int:
        from retriever.searching.index import build_tuned_index

        part = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.part)
        if part is None:
            raise ArgumentError("part", f"expected a part and their number, as in 2/8, found {self.part!r}")
        store, factory, rows, tuning = build_tuned_index(
            self.embeddings,
            self.out,
            factory=self.factory,
            target_recall=self.target_recall,
            k=self.k,
            queries=self.query_texts(),
            model=self.model,
            held_out=self.held_out,
            memory_budget_mib=self.memory_budget_mib,
            part=(int(part[1]), int(part[2])),
            train_from=self.train_from,
            on_disk=self.on_disk,
            gpu=self.gpu,
            seed=self.seed,
            dim=self.dim,
            progress=reporter,
        )
        summary = {"index": str(self.out), "factory": factory, "rows": rows, "dim": store.dim}
        return _finish(self.json, summary, tuning, reporter) if rank() == 0 else 0


@dataclass(frozen=True, kw_only=True)
class IndexTune(RecallTarget):
    """Find the cheapest search settings of an index that reach a recall."""

    index: Positional[Path]
    """The index. It is replaced by one with the same vectors and new search settings."""
    embeddings: Path
    """Folder of the embeddings of its passages, in the same order; the store may have further passages among them."""
    target_recall: float = 0.95
    """Recall to reach. The exit code is 1 if no settings reach it."""
    device: str = "auto"
    """Where recall is measured: cpu, cuda (all GPUs), cuda:1 …; auto: a GPU if faiss has GPU support and can search the
    index there, otherwise the CPU."""
    json: Switch = False
    """Print the summary as JSON."""

    def run(self, reporter: Reporter) -> int:
        from index.ann.edit import retune
        from index.ann.gpu.support import has_gpu
        from index.ann.tuning.recall import Target
        from index.manifest import INDEX, read_manifest
        from index.store.prefix import truncated_like
        from index.store.reader import EmbeddingStore
        from retriever.searching.index import check_target, query_vectors
        from retriever.utils.check_progress import checksum_progress

        queries = self.query_texts()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ArgumentError("device", f"expected auto, cpu or cuda[:number], found {self.device!r}")
        check_target(self.target_recall, self.k, queries, self.model, self.held_out)
        model = read_manifest(self.index, INDEX).texts("model")
        store = truncated_like(EmbeddingStore.open(self.embeddings), model)
        vectors = query_vectors(store, queries, self.model, reporter)
        target = Target(self.target_recall, self.k, vectors, self.held_out)
        with (
            checksum_progress(reporter, [self.index, self.embeddings]) as checked,
            reporter.bar("tune", None, "settings") as advance,
        ):
            tuning = retune(
                self.index,
                store,
                target,
                device=self.device if self.device != "auto" or has_gpu() else "cpu",
                note=lambda text: advance(1, text),
                checked=checked,
            )
        reporter.line(tuning.line())
        rows = read_manifest(self.index, INDEX).count("rows")
        return _finish(self.json, {"index": str(self.index), "rows": rows}, tuning, reporter)


def _finish(as_json: bool, summary: dict[str, Any], tuning: Tuning | None, reporter: Reporter) -> int:
    """Print the answer. Missing the target recall is a failure, although the index is kept."""
    if tuning is None:
        answer(as_json, summary)
        return 0
    from index.ann.layout import CURVE_FILE

    if not (Path(str(summary["index"])) / CURVE_FILE).exists():
        reporter.line('the recall curve is in the manifest only; to plot it: pip install "dense-retriever[plot]"')
    chosen = tuning.chosen
    answer(as_json, {**summary, "target_met": tuning.met, "recall": round(chosen.recall, 4), **chosen.settings.known()})
    return 0 if tuning.met else 1
