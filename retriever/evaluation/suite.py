"""A model on any number of sets: checked first, embedded once, searched exactly and by an index, reported."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eval.approximate import Approximation, approximation, search_by_parts
from eval.evaluate import Find, exact_products, exact_search, is_windows, query_vectors, ranked_run, score
from eval.long_documents import WINDOWS
from eval.metrics import KS, Metrics
from eval.ranking import RankedRun
from eval.reports.markdown import left_out_line
from eval.reports.suite import SetResult, SuiteResult, sums, write_suite
from eval.runs import write_trec_run
from eval.sets.plan import Plan, Task, check_outside, rows_of_tasks
from index.beir import BeirDataset
from index.files import InputError, sha256_file
from index.passages import Passage, PassageFile
from index.progress import Reporter
from index.records import count_records
from index.store.reader import EmbeddingStore
from retriever.distributed.agreement import ContentHash, check_same_folder, check_same_on_ranks
from retriever.distributed.ranks import Ranks
from retriever.encoding.corpus import corpus_source, encode_passages
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.files import embed_queries
from retriever.evaluation.long_documents import split_documents
from retriever.evaluation.set_settings import SetSettings, towers_for
from retriever.models.towers import Towers
from retriever.utils.check_progress import checksum_progress
from retriever.utils.versions import COMPUTING, device_name, versions

if TYPE_CHECKING:
    from index.ann.index import Index


@dataclass(frozen=True)
class SuiteOptions:
    """What is asked for beyond the model and the sets."""

    k: int = 1000
    """Passages a query in the run."""
    windows: bool = False
    """Score long documents by their best window, instead of cutting them."""
    overlap: int = 32
    """Tokens that windows share with the one before."""
    factory: str | None = None
    """Build this FAISS index of each corpus and evaluate it beside exact search."""
    index: Path | None = None
    """Evaluate this index, built of the same corpus by the same model, beside exact search."""
    settings: Mapping[str, SetSettings] = field(default_factory=dict)
    """Prompts and lengths by set."""
    dangling: bool = False
    """Go on where qrels judge passages or queries that are not there."""
    keep_identical_ids: bool = False
    """Leave no passage out of a ranking for having its query's id."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors on disk."""
    shard_rows: int = 65536
    """Passages a shard of the store."""


class Suite:
    """One model's evaluation on the sets of a plan, by all ranks together."""

    def __init__(
        self,
        towers: Towers,
        plan: Plan,
        out: Path,
        encode: EncodeOptions,
        options: SuiteOptions,
        reporter: Reporter,
        ranks: Ranks | None = None,
    ) -> None:
        self._towers = towers
        self._plan = plan
        self._out = out
        self._encode = encode
        self._options = options
        self._ranks = ranks or Ranks()
        self._terminal = reporter
        self._sources: dict[str, dict[str, str]] = {}
        check_outside(out, plan.tasks)
        self._index = self._checked_index()

    def run(self, details: Mapping[str, Any], checked: Mapping[str, Any]) -> SuiteResult:
        """Evaluate every set and write the report.

        OUT/SET/embeddings/ (or windows/), OUT/SET/run.trec, OUT/SET/index/ and OUT/SET/index.trec where an index was
        asked for; OUT/evaluation.json; OUT/report.*.
        """
        self._agree_on_sets()
        results = {task.name: self._evaluate(task) for task in self._plan.tasks}
        exact = {name: result.metrics for name, result in results.items()}
        found = {name: result.approximation for name, result in results.items() if result.approximation}
        whole = SuiteResult(rows_of_tasks(self._plan.tasks, exact), self._plan.absent, exact, found)
        if self._ranks.is_first:
            how = {**details, **self._details(), "versions": versions(*COMPUTING)}
            write_suite(self._out, self._plan.tasks, whole, results, how, checked)
        self._ranks.barrier()
        return whole

    def _agree_on_sets(self) -> None:
        """Compare what this rank is about to evaluate on with what the others are; the models when they embed."""
        if self._ranks.group is None:
            return
        sets: dict[str, Any] = {"--data": [[task.name, task.split, task.row] for task in self._plan.tasks]}
        for task in self._plan.tasks:
            dataset = BeirDataset.open(task.folder, task.split, dangling=self._options.dangling)
            self._sources[task.name] = corpus_source(dataset.corpus_file)
            sets |= {
                f"{task.name}: corpus": ContentHash(self._sources[task.name]["sha256"], str(dataset.corpus_file)),
                # As they are read: their order is that of the report.
                f"{task.name}: queries": ContentHash.of(list(dataset.queries.items()), str(task.folder)),
                f"{task.name}: qrels": ContentHash.of(list(dataset.qrels.items()), str(dataset.qrels_file)),
            }
        check_same_on_ranks(self._ranks, sets)
        check_same_folder(self._ranks, "out", self._out)

    def _checked_index(self) -> Index | None:
        """The index that is asked for, its every byte checked, if any is.

        It, or a factory string, that will not do is refused before hours of embedding rather than after.
        """
        folder, factory, tasks = self._options.index, self._options.factory, self._plan.tasks
        if folder is not None:
            from index.ann.index import Index
            from index.manifest import INDEX, read_manifest

            if len(tasks) != 1:
                raise InputError(f"{folder}: expected one set to go with one index, found {len(tasks)}")
            index = Index(read_manifest(folder, INDEX))
            index.check_model(self._towers_of(tasks[0]).fingerprint())
            # The first rank alone searches it.
            if self._ranks.is_first:
                with checksum_progress(self._terminal, [folder]) as checked:
                    index.check(checked)
            return index
        if factory is not None:
            from index.ann.factory import import_faiss, make

            import_faiss()
            if factory != "auto":
                make(factory, self._towers.dimension)
        return None

    def _towers_of(self, task: Task) -> Towers:
        return towers_for(self._towers, self._options.settings, task.name, task.row)

    def _evaluate(self, task: Task) -> SetResult:
        towers, place = self._towers_of(task), self._out / task.name
        dataset = BeirDataset.open(task.folder, task.split, dangling=self._options.dangling)
        dataset = dataclasses.replace(dataset, name=task.name)
        began = time.perf_counter()
        store = self._embedded(towers, task, dataset.corpus_file, place)
        encoded = time.perf_counter()
        vectors = query_vectors(
            dataset, lambda texts: embed_queries(towers, texts, self._encode, self._terminal), store.dim
        )
        asked = time.perf_counter()
        ids = store.ids()
        with self._terminal.bar(f"{task.name}: search", store.rows, "passages") as advance:
            device, several = str(towers.device), self._ranks.world_size > 1
            find = exact_search(store, ids, device=device, progress=advance, on_ranks=several)
            run = self._ranked(dataset, ids, find, vectors, store)
        if run.left_out:
            self._terminal.line(left_out_line(task.name, run.left_out))
        searched = time.perf_counter()
        result = SetResult(run, self._score(dataset, run), dataset.qrels, sums(dataset, store))
        result.seconds = {
            "encode corpus": encoded - began,
            "encode queries": asked - encoded,
            "search": searched - asked,
            "metrics": time.perf_counter() - searched,
        }
        if self._ranks.is_first:
            write_trec_run(place / "run.trec", run, "retriever")
            result.runs["run.trec"] = sha256_file(place / "run.trec")
            if self._options.factory is not None or self._options.index is not None:
                result.approximation = self._by_index(task, dataset, store, towers, vectors, result)
        self._ranks.barrier()
        return result

    def _score(self, dataset: BeirDataset, run: RankedRun) -> Metrics:
        """The usual cut-offs, and the whole depth that was asked for."""
        cuts, keep = sorted({*KS, self._options.k}), self._options.keep_identical_ids
        return score(dataset, run, self._options.k, cuts, keep_identical_ids=keep)

    def _ranked(
        self, dataset: BeirDataset, ids: Sequence[str], find: Find, vectors: np.ndarray, store: EmbeddingStore
    ) -> RankedRun:
        k, keep = self._options.k, self._options.keep_identical_ids
        return ranked_run(dataset, ids, find, lambda: vectors, k, is_windows(store), keep_identical_ids=keep)

    def _embedded(self, towers: Towers, task: Task, corpus: Path, place: Path) -> EmbeddingStore:
        """The corpus's store: embedded, continued or used again."""
        passages: Iterable[Passage] = PassageFile(corpus)
        source = dict(self._sources.get(task.name) or corpus_source(corpus))
        if self._options.windows:
            source[WINDOWS] = f"overlap {self._options.overlap}"
            passages = split_documents(towers, passages, self._options.overlap)
        total = count_records(corpus) if self._terminal.is_live and not self._options.windows else None
        folder = place / (WINDOWS if self._options.windows else "embeddings")
        with (
            checksum_progress(self._terminal, [folder]) as checked,
            self._terminal.bar(f"{task.name}: encode", total, "passages") as advance,
        ):
            return encode_passages(
                towers,
                passages,
                folder,
                self._encode,
                source=source,
                dtype=self._options.dtype,
                shard_rows=self._options.shard_rows,
                ranks=self._ranks,
                progress=advance,
                checked=checked,
            )

    def _by_index(
        self, task: Task, dataset: BeirDataset, store: EmbeddingStore, towers: Towers, vectors: Any, exact: SetResult
    ) -> Approximation:
        """What an index of the same vectors finds."""
        import faiss

        from index.ann.settings import Settings

        index = self._index or self._built(task, store)
        index.check_model(towers.fingerprint())
        # Again where it has changed while the corpus was embedded.
        index.check()
        if index.rows != store.rows:
            expected = f"expected an index of {dataset.name}, {store.rows} rows"
            raise InputError(f"{index.folder}: {expected}, found {index.rows}")
        began = time.perf_counter()
        with self._terminal.bar(f"{task.name}: search by index", len(vectors), "queries") as advance:
            run = self._ranked(dataset, index.ids, search_by_parts(index.search_rows, advance), vectors, store)
        exact.seconds["search by index"] = time.perf_counter() - began
        made = {name: index.manifest.fields.get(name) for name in ("factory", "seed", "trained_on")}
        exact.index = {**made, **Settings.of(index.faiss).known(), "faiss": faiss.__version__}
        place = self._out / task.name / "index.trec"
        write_trec_run(place, run, "retriever")
        exact.runs[place.name] = sha256_file(place)
        products = exact_products(store, vectors)
        return approximation(index.factory, exact.run, run, self._score(dataset, run), products)

    def _built(self, task: Task, store: EmbeddingStore) -> Index:
        """The index of the store, built, or used again with its every byte checked."""
        from index.ann import build as faiss_index
        from index.ann.build import choose_for
        from index.manifest import INDEX, NAME, read_manifest

        folder, factory = self._out / task.name / "index", self._options.factory
        assert factory is not None
        if factory == "auto":
            factory = choose_for(store, None)
        if (folder / NAME).exists():
            fields = read_manifest(folder, INDEX).fields
            wanted = {"rows": store.rows, "dim": store.dim, "model": store.model, "source": store.source}
            if all(fields.get(name) == value for name, value in {**wanted, "factory": factory}.items()):
                with checksum_progress(self._terminal, [folder]) as checked:
                    return faiss_index.Index.open(folder, verify="hash", progress=checked)
        with self._terminal.bar(f"{task.name}: index {factory}", store.rows, "vectors") as advance:
            faiss_index.build(store, folder, factory=factory, progress=advance)
        return faiss_index.Index.open(folder)

    def _details(self) -> dict[str, Any]:
        """How all sets were evaluated."""
        cut = "cut at the model's maximum"
        windows = f"best window, each {self._options.overlap} tokens into the one before"
        return {
            "model sha256": self._towers.fingerprint()["sha256"],
            **dataclasses.asdict(self._encode),
            "vectors": self._options.dtype,
            "search": f"exact, inner product, {self._options.k} passages a query",
            "long documents": windows if self._options.windows else cut,
            "identical ids": "kept" if self._options.keep_identical_ids else "left out where not judged",
            "settings": {name: dataclasses.asdict(own) for name, own in self._options.settings.items()},
            "processes": self._ranks.world_size,
            "device": device_name(self._towers.device),
        }
