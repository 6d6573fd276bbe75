"""The commands that build an index and tune it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from index.files import InputError
from index.progress import Reporter
from retriever.cli.commands.common import Switch, answer, check_counts, same_settings
from retriever.errors import ConfigError
from retriever.utils.torchrun import process_count

if TYPE_CHECKING:
    import numpy as np

    from index.ann.tuning.recall import Target
    from index.ann.tuning.tune import Tuning
    from index.store.reader import EmbeddingStore
    from retriever.distributed.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class RecallTarget:
    """What an index is tuned by: a recall, and the queries to measure it with."""

    k: int = 10
    """Passages a query that the recall is about."""
    queries: Path | None = None
    """A file of real queries to measure by (.jsonl, .csv, .tsv, .parquet), with --model; passages are taken without."""
    model: str | None = None
    """Model folder or hub name that embeds --queries."""
    held_out: int = 2000
    """How many passages to measure by where there are no queries; they are kept out of the training sample."""

    def __post_init__(self) -> None:
        from index.ann.tuning.recall import MIN_QUERIES

        check_counts(self, "k")
        if self.held_out < MIN_QUERIES:
            raise ValueError(f"--held-out: expected at least {MIN_QUERIES}, found {self.held_out}")
        if (self.queries is None) != (self.model is None):
            raise ValueError("--queries: expected together with --model, the one that embedded the passages")

    def target(self, recall: float, store: EmbeddingStore, reporter: Reporter) -> Target:
        """The recall to reach, with the queries embedded."""
        from index.ann.tuning.recall import Target

        queries = None if self.queries is None else self._embedded(self.queries, store, reporter)
        return Target(recall, self.k, queries, self.held_out)

    def _embedded(self, path: Path, store: EmbeddingStore, reporter: Reporter) -> np.ndarray:
        from index.beir import read_queries
        from retriever.encoding.encoder import EncodeOptions, embed_texts
        from retriever.models.towers import load_towers
        from retriever.utils.device import choose_device

        assert self.model is not None
        texts = list(read_queries(path).values())
        towers = load_towers(self.model, choose_device("auto"))
        towers.eval()
        if (found := towers.fingerprint()) != store.model:
            raise InputError(f"{self.model}: expected the model of {store.folder} ({store.model}), found {found}")
        with reporter.bar(f"encode {path.name}", len(texts), "queries") as advance:
            return embed_texts(towers, texts, "query", EncodeOptions(), advance)


@dataclass(frozen=True, kw_only=True)
class IndexBuild(RecallTarget):
    """Build a FAISS index of an embedding store. Under torchrun the processes build it together, in parts."""

    embeddings: Path
    """Folder that `retriever encode` wrote."""
    out: Path
    """Folder of the index."""
    factory: str = "auto"
    """FAISS factory string (Flat, SQfp16, IVF1024,Flat, HNSW32, OPQ32,IVF1024,PQ32x4fs …); auto chooses by size,
    memory budget, and whether the vectors are equally long, and says why."""
    memory_budget_mib: float | None = None
    """Most memory that the index may take, in MiB; with --on-disk, most of it that is held while building."""
    target_recall: float | None = None
    """Find the cheapest search settings that reach this recall; the exit code is 1 where none does."""
    part: str = "1/1"
    """Build only this part of the embeddings, as in 2/8: the others are built elsewhere and merged."""
    train_from: Path | None = None
    """An index whose training to take over, so that the two can be merged."""
    on_disk: Switch = False
    """Leave the inverted lists on disk, for indexes larger than memory."""
    gpu: Switch = False
    """Train and fill on all GPUs (needs faiss-gpu); with its cuVS, HNSW… graphs are built there too."""
    seed: int = 0
    """Of the sample of vectors that the index is trained on."""
    json: Switch = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        part = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.part)
        if part is None or int(part[1]) > int(part[2]):
            raise ValueError(f"--part: expected a part and their number, as in 2/8, found {self.part!r}")
        if self.memory_budget_mib is not None and not self.memory_budget_mib > 0:
            raise ValueError(f"--memory-budget-mib: expected more than 0, found {self.memory_budget_mib}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed: expected a number from 0 to {2**31 - 1}, found {self.seed}")
        _check_recall(self.target_recall)
        if self.target_recall is None and self.queries is not None:
            raise ValueError("--queries: expected --target-recall beside it")
        if self.train_from is not None and self.factory != "auto":
            raise ValueError("--factory: leave it out with --train-from, which gives the factory")

    def run(self, reporter: Reporter) -> int:
        if process_count() == 1:
            return self._build(reporter, None)
        from retriever.distributed.context import SilentReporter, joined_ranks

        if self.part != "1/1":
            raise ConfigError("--part: leave it out under torchrun, whose processes share the embeddings by themselves")
        if self.gpu:
            raise ConfigError("--gpu: leave it out under torchrun; one process trains and fills on all GPUs")
        paths = ("embeddings", "out", "queries", "model", "train_from")
        with joined_ranks(same_settings("index build", self, "cpu", *paths, "json")) as ranks:
            return self._build(reporter if ranks.first else SilentReporter(), ranks)

    def _build(self, reporter: Reporter, ranks: Ranks | None) -> int:
        from index.ann.build import Plan, build
        from index.ann.factory import explain
        from index.ann.layout import FAISS_FILE
        from index.store.parts import Part
        from index.store.reader import EmbeddingStore
        from retriever.utils.check_progress import checking

        store = EmbeddingStore.open(self.embeddings)
        number, count = map(int, self.part.split("/"))
        rows = Part(store, number, count).rows
        factory, reason = self._chosen(store)
        # What stays on disk may be larger than memory.
        reporter.line(explain(factory, rows, store.dim, None if self.on_disk else self.memory_budget_mib) + reason)
        first = ranks is None or ranks.first
        target = None
        if self.target_recall is not None and first:
            target = self.target(self.target_recall, store, reporter)
        plan = Plan(
            factory,
            self.seed,
            self.memory_budget_mib,
            target,
            (number, count),
            self.train_from,
            self.on_disk,
            self.gpu,
        )
        with (
            checking(reporter, [self.train_from] if self.train_from else [], [FAISS_FILE]) as checked,
            reporter.bar(f"index {factory}", rows if ranks is None else None, "vectors") as advance,
        ):

            def note(text: str) -> None:
                if text.startswith("factory "):
                    # Of the result, and not of what is done at the moment.
                    reporter.line(text)
                else:
                    advance(0, text)

            if ranks is None:
                tuning = build(store, self.out, plan, progress=advance, note=note, checked=checked)
            else:
                from retriever.distributed.index_build import build_on_ranks

                tuning = build_on_ranks(ranks, store, self.out, plan, progress=advance, note=note)
        summary = {"index": str(self.out), "factory": factory, "rows": rows, "dim": store.dim}
        return _finish(self.json, summary, tuning, reporter) if first else 0

    def _chosen(self, store: EmbeddingStore) -> tuple[str, str]:
        """The factory, and why it was chosen where nobody named it; one that cannot be on disk is refused."""
        from index.ann.build import choose_for
        from index.ann.factory import make, reason_of_choice
        from index.ann.index import Index
        from index.ann.on_disk import check_supported
        from index.manifest import INDEX, read_manifest

        if self.train_from is None and self.factory == "auto":
            rows, dim = store.rows, store.dim
            factory = choose_for(store, self.memory_budget_mib, on_disk=self.on_disk)
            return factory, f"; chosen for {reason_of_choice(factory, rows, dim, on_disk=self.on_disk)}"
        # Its bytes are checked before they are used.
        factory = self.factory if self.train_from is None else Index(read_manifest(self.train_from, INDEX)).factory
        if self.on_disk:
            check_supported(make(factory, store.dim), f"--on-disk with factory {factory!r}")
        return factory, ""


@dataclass(frozen=True, kw_only=True)
class IndexTune(RecallTarget):
    """Find an index's cheapest search settings that reach a recall."""

    index: Positional[Path]
    """The index; it is replaced by one with other settings and the same codes."""
    embeddings: Path
    """Folder of the vectors of its passages, in their order; others may stand among them."""
    target_recall: float = 0.95
    """Recall to reach; the exit code is 1 where no setting does."""
    json: Switch = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_recall(self.target_recall)

    def run(self, reporter: Reporter) -> int:
        from index.ann.edit import retune
        from index.manifest import INDEX, read_manifest
        from index.store.reader import EmbeddingStore
        from retriever.utils.check_progress import checking

        store = EmbeddingStore.open(self.embeddings)
        target = self.target(self.target_recall, store, reporter)
        with (
            checking(reporter, [self.index, self.embeddings]) as checked,
            reporter.bar("tune", None, "settings") as advance,
        ):
            tuning = retune(self.index, store, target, note=lambda text: advance(1, text), checked=checked)
        rows = read_manifest(self.index, INDEX).count("rows")
        return _finish(self.json, {"index": str(self.index), "rows": rows}, tuning, reporter)


def _check_recall(recall: float | None) -> None:
    if recall is not None and not 0 < recall <= 1:
        raise ValueError(f"--target-recall: expected more than 0 and at most 1, found {recall}")


def _finish(as_json: bool, summary: dict[str, Any], tuning: Tuning | None, reporter: Reporter) -> int:
    """Answer, with what tuning found; a promise that could not be kept is a failure, though the index stands."""
    if tuning is None:
        answer(as_json, summary)
        return 0
    from index.ann.layout import CURVE_FILE

    reporter.line(tuning.line())
    if not (Path(str(summary["index"])) / CURVE_FILE).exists():
        reporter.line('the curve is in the manifest alone; to have it drawn: pip install "dense-retriever[plot]"')
    chosen = tuning.chosen
    answer(as_json, {**summary, "target_met": tuning.met, "recall": round(chosen.recall, 4), **chosen.settings.known()})
    return 0 if tuning.met else 1
