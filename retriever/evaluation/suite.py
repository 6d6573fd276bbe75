"""Evaluation of a model on several BEIR sets: encode, search exactly and with an index, score, report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.approximate import Approximation, approximation, search_by_parts
from eval.evaluate import Find, exact_products, exact_search, is_windows, query_vectors, ranked_run, score
from eval.long_documents import WINDOWS
from eval.metrics import KS, Metrics
from eval.ranking import RankedRun
from eval.reports.markdown import left_out_line
from eval.reports.suite import SetResult, SuiteResult, data_checksums, write_suite
from eval.runs import write_trec_run
from eval.sets.plan import Plan, Task, check_outside, rows_of_tasks
from eval.sizes import SizeResult
from index.ann.rescoring import search_rescored
from index.beir import BeirDataset
from index.files import InputError, sha256_file
from index.passages import Passage, PassageFile
from index.progress import Reporter
from index.records import count_records
from index.store.prefix import truncated, unit_prefix
from index.store.quantized import QuantizedStore
from index.store.reader import EmbeddingStore
from retriever.distributed.agreement import ContentHash, check_same_folder, check_same_on_ranks
from retriever.distributed.ranks import Ranks
from retriever.encoding.corpus import StoreOptions, corpus_source, encode_passages
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.files import embed_queries
from retriever.evaluation.long_documents import split_documents
from retriever.evaluation.set_settings import towers_for
from retriever.evaluation.suite_index import build_or_reuse_index, check_factory, check_one_set, open_index
from retriever.evaluation.suite_options import LowerPrecision, SuiteOptions
from retriever.models.towers import Towers
from retriever.utils.check_progress import checksum_progress
from retriever.utils.indexes import place_index
from retriever.utils.versions import COMPUTING, device_name, versions

if TYPE_CHECKING:
    from index.ann.index import Index


class Suite:
    """Evaluation of a model on the sets of a plan; all ranks share the work.

    Args:
        towers: the model in evaluation mode, on the device to use.
        plan: the sets.
        out: the folder of the report, outside the sets.
        encode: precision and micro-batch size.
        options: options of the evaluation.
        reporter: shows progress.
        ranks: all ranks; each must construct the object and call `run`. Default: None, one process.

    Raises:
        InputError: `out` is inside a set, or the requested index does not match the model and the sets.
    """

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
        self._reporter = reporter
        self._sources: dict[str, dict[str, str]] = {}
        check_outside(out, plan.tasks)
        self._index: Index | None = None
        if options.index is not None:
            only = self._towers_of(check_one_set(options.index, plan.tasks))
            self._index = open_index(options.index, only, reporter if self._ranks.is_first else None)
        elif options.factory is not None:
            check_factory(options.factory, towers.dimension)

    def run(self, details: Mapping[str, Any], checked: Mapping[str, Any]) -> SuiteResult:
        """Evaluate every set and write the report.

        Writes OUT/SET/embeddings/ (or windows/), OUT/SET/run.trec, OUT/evaluation.json and OUT/report.*; with an index
        also OUT/SET/index.trec, and OUT/SET/index/ if it is built.

        Args:
            details: what the report states about the model: "model" and others.
            checked: set -> result of its validation, for evaluation.json.

        Raises:
            InputError: a set or an existing store or index is invalid.
            RanksDifferError: the ranks have different models, sets or folders.
        """
        self._agree_on_sets()
        results = {task.name: self._evaluate(task) for task in self._plan.tasks}
        exact = {name: result.metrics for name, result in results.items()}
        approximations = {name: result.approximation for name, result in results.items() if result.approximation}
        sizes = [
            SizeResult(dim, precision or self._options.dtype, rows_of_tasks(self._plan.tasks, metrics))
            for dim in self._dims
            for precision in (None, *self._options.precisions)
            for metrics in [
                {
                    name: result.by_dim[dim] if precision is None else result.by_precision[dim, precision]
                    for name, result in results.items()
                }
            ]
        ]
        rows = rows_of_tasks(self._plan.tasks, exact)
        summary = SuiteResult(rows, self._plan.absent, exact, approximations, sizes)
        if self._ranks.is_first:
            details = {**details, **self._details(), "versions": versions(*COMPUTING)}
            write_suite(self._out, self._plan.tasks, summary, results, details, checked)
        self._ranks.barrier()
        return summary

    def _agree_on_sets(self) -> None:
        """Check that all ranks evaluate the same sets; encoding compares the models."""
        if self._ranks.group is None:
            return
        sets: dict[str, Any] = {"--data": [[task.name, task.split, task.row] for task in self._plan.tasks]}
        for task in self._plan.tasks:
            dataset = BeirDataset.open(task.folder, task.split, dangling=self._options.dangling)
            self._sources[task.name] = corpus_source(dataset.corpus_file)
            sets |= {
                f"{task.name}: corpus": ContentHash(self._sources[task.name]["sha256"], str(dataset.corpus_file)),
                # In file order, which is the order of the report.
                f"{task.name}: queries": ContentHash.of(list(dataset.queries.items()), str(task.folder)),
                f"{task.name}: qrels": ContentHash.of(list(dataset.qrels.items()), str(dataset.qrels_file)),
            }
        check_same_on_ranks(self._ranks, sets)
        check_same_folder(self._ranks, "out", self._out)

    def _towers_of(self, task: Task) -> Towers:
        return towers_for(self._towers, self._options.settings, task.name, task.row)

    def _evaluate(self, task: Task) -> SetResult:
        towers, folder = self._towers_of(task), self._out / task.name
        dataset = BeirDataset.open(task.folder, task.split, dangling=self._options.dangling)
        dataset = dataclasses.replace(dataset, name=task.name)
        started = time.perf_counter()
        store = self._encode_corpus(towers, task, dataset.corpus_file, folder)
        corpus_encoded = time.perf_counter()
        vectors = query_vectors(
            dataset, lambda texts: embed_queries(towers, texts, self._encode, self._reporter), store.dim
        )
        queries_encoded = time.perf_counter()
        ids = store.ids()
        with self._reporter.bar(f"{task.name}: search", store.rows, "passages") as advance:
            device, on_ranks = str(towers.device), self._ranks.world_size > 1
            find = exact_search(store, ids, device=device, progress=advance, on_ranks=on_ranks)
            run = self._ranked(dataset, ids, find, vectors, store)
        if run.left_out:
            self._reporter.line(left_out_line(task.name, run.left_out))
        searched = time.perf_counter()
        result = SetResult(run, self._score(dataset, run), dataset.qrels, data_checksums(dataset, store))
        result.seconds = {
            "encode corpus": corpus_encoded - started,
            "encode queries": queries_encoded - corpus_encoded,
            "search": searched - queries_encoded,
            "metrics": time.perf_counter() - searched,
        }
        for dim in self._dims:
            result.by_dim[dim] = self._evaluate_dim(task, dataset, store, vectors, dim, result)
            for precision in self._options.precisions:
                found = self._evaluate_precision(task, dataset, store, vectors, dim, precision, result)
                result.by_precision[dim, precision] = found
        if self._ranks.is_first:
            write_trec_run(folder / "run.trec", run, "retriever")
            result.runs["run.trec"] = sha256_file(folder / "run.trec")
            if self._options.factory is not None or self._options.index is not None:
                result.approximation = self._evaluate_index(task, dataset, store, towers, vectors, result)
        self._ranks.barrier()
        return result

    def _evaluate_dim(
        self, task: Task, dataset: BeirDataset, store: EmbeddingStore, vectors: np.ndarray, dim: int, full: SetResult
    ) -> Metrics:
        """Search exactly with embeddings truncated to `dim`; adds the run file to `full`."""
        if dim == store.dim:
            return full.metrics
        prefix, ids, on_ranks = truncated(store, dim), store.ids(), self._ranks.world_size > 1
        with self._reporter.bar(f"{task.name}: search {dim} dimensions", store.rows, "passages") as advance:
            device = str(self._towers.device)
            find = exact_search(prefix, ids, device=device, progress=advance, on_ranks=on_ranks)
            run = self._ranked(dataset, ids, find, unit_prefix(vectors, dim), prefix)
        if self._ranks.is_first:
            file = self._out / task.name / f"dim-{dim}.trec"
            write_trec_run(file, run, "retriever")
            full.runs[file.name] = sha256_file(file)
        return self._score(dataset, run)

    @property
    def _dims(self) -> tuple[int, ...]:
        """The dimensions of further results."""
        return self._options.dims or ((self._towers.dimension,) if self._options.precisions else ())

    def _evaluate_precision(
        self,
        task: Task,
        dataset: BeirDataset,
        store: EmbeddingStore,
        vectors: np.ndarray,
        dim: int,
        precision: LowerPrecision,
        full: SetResult,
    ) -> Metrics:
        """Search with passages in fewer bits and queries in float32; adds the run file to `full`."""
        part, queries = truncated(store, dim), vectors if dim == store.dim else unit_prefix(vectors, dim)
        ids, device, on_ranks = store.ids(), str(self._towers.device), self._ranks.world_size > 1
        with self._reporter.bar(f"{task.name}: search {dim} × {precision}", store.rows, "passages") as advance:
            if precision == "binary+int8":
                codes = np.concatenate([found for _, found in QuantizedStore(part, "binary").codes()])
                fine = QuantizedStore(part, "int8")

                def rescored(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
                    return search_rescored(queries, codes, fine, k)

                run = self._ranked(dataset, ids, rescored, queries, part)
                advance(store.rows)
            else:
                lower = QuantizedStore(part, precision)
                exact = exact_search(lower, ids, device=device, progress=advance, on_ranks=on_ranks)
                run = self._ranked(dataset, ids, exact, queries, lower)
        if self._ranks.is_first:
            file = self._out / task.name / f"dim-{dim}-{precision}.trec"
            write_trec_run(file, run, "retriever")
            full.runs[file.name] = sha256_file(file)
        return self._score(dataset, run)

    def _score(self, dataset: BeirDataset, run: RankedRun) -> Metrics:
        """Compute the metrics at the default cut-offs and at the depth of the run."""
        cuts, keep = sorted({*KS, self._options.k}), self._options.keep_identical_ids
        return score(dataset, run, self._options.k, cuts, keep_identical_ids=keep)

    def _ranked(
        self, dataset: BeirDataset, ids: Sequence[str], find: Find, vectors: np.ndarray, store: EmbeddingStore
    ) -> RankedRun:
        k, keep = self._options.k, self._options.keep_identical_ids
        return ranked_run(dataset, ids, find, lambda: vectors, k, is_windows(store), keep_identical_ids=keep)

    def _encode_corpus(self, towers: Towers, task: Task, corpus: Path, folder: Path) -> EmbeddingStore:
        """Encode the corpus; an existing store is continued or reused."""
        passages: Iterable[Passage] = PassageFile(corpus)
        source = dict(self._sources.get(task.name) or corpus_source(corpus))
        if self._options.windows:
            source[WINDOWS] = f"overlap {self._options.overlap}"
            passages = split_documents(towers, passages, self._options.overlap)
        total = count_records(corpus) if self._reporter.is_live and not self._options.windows else None
        store = folder / (WINDOWS if self._options.windows else "embeddings")
        with (
            checksum_progress(self._reporter, [store]) as checked,
            self._reporter.bar(f"{task.name}: encode", total, "passages") as advance,
        ):
            return encode_passages(
                towers,
                passages,
                store,
                self._encode,
                source=source,
                storage=StoreOptions(self._options.dtype, self._options.shard_rows),
                ranks=self._ranks,
                progress=advance,
                checked=checked,
            )

    def _evaluate_index(
        self,
        task: Task,
        dataset: BeirDataset,
        store: EmbeddingStore,
        towers: Towers,
        vectors: np.ndarray,
        exact: SetResult,
    ) -> Approximation:
        """Search with the index and compare it with exact search; adds times, settings and the run to `exact`."""
        from index.ann.factory import import_faiss
        from index.ann.settings import Settings

        index = self._index
        if index is None:
            assert self._options.factory is not None
            folder, name = self._out / task.name / "index", task.name
            index = build_or_reuse_index(store, folder, self._options.factory, name, self._reporter)
        index.check_model(towers.fingerprint())
        # Verifies the index again if its files have changed since.
        index.check()
        if index.rows != store.rows:
            expected = f"expected an index of {dataset.name}, {store.rows} rows"
            raise InputError(f"{index.folder}: {expected}, found {index.rows}")
        place_index(
            index,
            towers.device,
            self._reporter,
            index_device=self._options.index_device,
            index_spread=self._options.index_spread,
        )
        started = time.perf_counter()
        with self._reporter.bar(f"{task.name}: search by index", len(vectors), "queries") as advance:
            run = self._ranked(dataset, index.ids, search_by_parts(index.search_rows, advance), vectors, store)
        exact.seconds["search by index"] = time.perf_counter() - started
        origin = {name: index.manifest.fields.get(name) for name in ("factory", "seed", "trained_on")}
        settings = Settings.of(index.faiss).known()
        exact.index = {**origin, **settings, "faiss": import_faiss().__version__, "device": index.device}
        file = self._out / task.name / "index.trec"
        write_trec_run(file, run, "retriever")
        exact.runs[file.name] = sha256_file(file)
        products = exact_products(store, vectors)
        return approximation(index.factory, exact.run, run, self._score(dataset, run), products)

    def _details(self) -> dict[str, Any]:
        """How all sets were evaluated, for the report."""
        truncated = "truncated at the model's maximum length"
        windows = f"best window; consecutive windows share {self._options.overlap} tokens"
        return {
            "model sha256": self._towers.sha256(),
            **dataclasses.asdict(self._encode),
            "vectors": self._options.dtype,
            "dimensions": self._towers.dimension,
            "search": f"exact, inner product, {self._options.k} passages per query",
            "long documents": windows if self._options.windows else truncated,
            "identical ids": "kept" if self._options.keep_identical_ids else "left out where not judged",
            "settings": {name: dataclasses.asdict(own) for name, own in self._options.settings.items()},
            "processes": self._ranks.world_size,
            "device": device_name(self._towers.device),
        }
