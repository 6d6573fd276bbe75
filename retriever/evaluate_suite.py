"""A model on any number of sets: checked first, embedded once, searched exactly and by an index, reported."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.approximate import Approximation, approximation, search_by_parts
from eval.evaluate import exact_search, is_windows, query_vectors, ranked_run, score
from eval.long_documents import WINDOWS
from eval.metrics import KS, Metrics
from eval.ranking import RankedRun
from eval.runs import write_trec_run
from eval.suite import Plan, Task, check_outside, rows_of_tasks
from index.beir import BeirDataset
from index.embeddings import EmbeddingStore
from index.files import InputError
from index.passages import Passage, PassageFile
from index.records import count_records
from retriever.encode import EncodeOptions
from retriever.encode_corpus import corpus_source, encode_passages
from retriever.encode_files import embed_queries
from retriever.progress import Terminal
from retriever.ranks import Ranks
from retriever.set_settings import SetSettings, towers_for
from retriever.split_documents import split_documents
from retriever.suite_report import SetResult, SuiteResult, sums, write_suite
from retriever.towers import Towers
from retriever.versions import device_name


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
        terminal: Terminal,
        ranks: Ranks | None = None,
    ) -> None:
        self._towers = towers
        self._plan = plan
        self._out = out
        self._encode = encode
        self._options = options
        self._ranks = ranks or Ranks()
        self._terminal = terminal
        check_outside(out, plan.tasks)
        self._check_index()

    def run(self, details: Mapping[str, Any], checked: Mapping[str, Any]) -> SuiteResult:
        """Evaluate every set and write the report.

        OUT/SET/embeddings/ (or windows/), OUT/SET/run.trec, OUT/SET/index/ and OUT/SET/index.trec where an index was
        asked for; OUT/evaluation.json; OUT/report.*.
        """
        results = {task.name: self._evaluate(task) for task in self._plan.tasks}
        exact = {name: result.metrics for name, result in results.items()}
        found = {name: result.approximation for name, result in results.items() if result.approximation}
        whole = SuiteResult(rows_of_tasks(self._plan.tasks, exact), self._plan.absent, exact, found)
        if self._ranks.first:
            how = {**details, **self._details()}
            write_suite(self._out, self._plan.tasks, whole, results, how, checked)
        self._ranks.wait()
        return whole

    def _check_index(self) -> None:
        """Refuse an index or a factory string that will not do, before hours of embedding rather than after."""
        folder, factory, tasks = self._options.index, self._options.factory, self._plan.tasks
        if folder is not None:
            from index.faiss_index import Index

            if len(tasks) != 1:
                raise InputError(f"{folder}: expected one set to go with one index, found {len(tasks)}")
            Index.open(folder, mmap=True).check_model(self._towers_of(tasks[0]).fingerprint())
        elif factory is not None:
            from index.factory import import_faiss, make

            import_faiss()
            if factory != "auto":
                make(factory, self._towers.dimension)

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
        ids, k = store.ids(), self._options.k
        with self._terminal.bar(f"{task.name}: search", store.rows, "passages") as advance:
            device, several = str(towers.device), self._ranks.size > 1
            find = exact_search(store, ids, device=device, progress=advance, on_ranks=several)
            run = ranked_run(dataset, ids, find, lambda: vectors, k, is_windows(store))
        searched = time.perf_counter()
        result = SetResult(run, self._score(dataset, run), dataset.qrels, sums(dataset, store))
        result.seconds = {
            "encode corpus": encoded - began,
            "encode queries": asked - encoded,
            "search": searched - asked,
            "metrics": time.perf_counter() - searched,
        }
        if self._ranks.first:
            write_trec_run(place / "run.trec", run, "retriever")
            if self._options.factory is not None or self._options.index is not None:
                result.approximation = self._by_index(task, dataset, store, towers, vectors, result)
        self._ranks.wait()
        return result

    def _score(self, dataset: BeirDataset, run: RankedRun) -> Metrics:
        """The usual cut-offs, and the whole depth that was asked for."""
        return score(dataset, run, self._options.k, sorted({*KS, self._options.k}))

    def _embedded(self, towers: Towers, task: Task, corpus: Path, place: Path) -> EmbeddingStore:
        """The corpus's store: embedded, continued or used again."""
        passages: Iterable[Passage] = PassageFile(corpus)
        source = corpus_source(corpus)
        if self._options.windows:
            source[WINDOWS] = f"overlap {self._options.overlap}"
            passages = split_documents(towers, passages, self._options.overlap)
        total = count_records(corpus) if self._terminal.is_live and not self._options.windows else None
        with self._terminal.bar(f"{task.name}: encode", total, "passages") as advance:
            return encode_passages(
                towers,
                passages,
                place / (WINDOWS if self._options.windows else "embeddings"),
                self._encode,
                source=source,
                dtype=self._options.dtype,
                shard_rows=self._options.shard_rows,
                ranks=self._ranks,
                progress=advance,
            )

    def _by_index(
        self, task: Task, dataset: BeirDataset, store: EmbeddingStore, towers: Towers, vectors: Any, exact: SetResult
    ) -> Approximation:
        """What an index of the same vectors finds."""
        import faiss

        from index.faiss_index import Index
        from index.settings import Settings

        folder = self._options.index or self._built(task, store)
        index = Index.open(folder)
        index.check_model(towers.fingerprint())
        if index.rows != store.rows:
            raise InputError(f"{folder}: expected an index of {dataset.name}, {store.rows} rows, found {index.rows}")
        began = time.perf_counter()
        k = self._options.k
        with self._terminal.bar(f"{task.name}: search by index", len(vectors), "queries") as advance:
            find = search_by_parts(index.search, advance)
            run = ranked_run(dataset, index.ids, find, lambda: vectors, k, is_windows(store))
        exact.seconds["search by index"] = time.perf_counter() - began
        made = {name: index.manifest.fields.get(name) for name in ("factory", "seed", "trained_on")}
        exact.index = {**made, **Settings.of(index.faiss).known(), "faiss": faiss.__version__}
        write_trec_run(self._out / task.name / "index.trec", run, "retriever")
        return approximation(index.factory, exact.run, run, self._score(dataset, run))

    def _built(self, task: Task, store: EmbeddingStore) -> Path:
        """The index of the store, built or used again."""
        from index import faiss_index
        from index.building import choose_for
        from index.manifest import INDEX, NAME, read_manifest

        folder, factory = self._out / task.name / "index", self._options.factory
        assert factory is not None
        if factory == "auto":
            factory = choose_for(store, None)
        if (folder / NAME).exists():
            fields = read_manifest(folder, INDEX).fields
            wanted = {"rows": store.rows, "dim": store.dim, "model": store.model, "source": store.source}
            if all(fields.get(name) == value for name, value in {**wanted, "factory": factory}.items()):
                return folder
        with self._terminal.bar(f"{task.name}: index {factory}", store.rows, "vectors") as advance:
            faiss_index.build(store, folder, factory=factory, progress=advance)
        return folder

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
            "settings": {name: dataclasses.asdict(own) for name, own in self._options.settings.items()},
            "processes": self._ranks.size,
            "device": device_name(self._towers.device),
        }
