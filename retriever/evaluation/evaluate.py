"""The public function `retriever.evaluate`, which evaluates a model on BEIR folders and writes a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np

from eval.metrics import Metrics, PerQuery
from eval.reports.suite import SuiteResult
from eval.sets import download as beir_download
from eval.sets.external import download_external, external_folder, external_names
from eval.sets.plan import BEIR, BY_NAME, WHOLE, Plan, plan
from index.ann.gpu.search import Spread
from index.files import InputError
from index.progress import Progress, Reporter, SilentReporter, as_reporter
from index.store.shards import StoreDtype
from retriever.distributed.agreement import flat_settings
from retriever.distributed.context import joined_ranks, rank_device, same_settings
from retriever.distributed.ranks import Ranks
from retriever.encoding.model import Model, ModelInput, as_model, load
from retriever.errors import ArgumentError, check_at_least, check_choice, check_paths, path_list
from retriever.evaluation.preflight import check_sets
from retriever.evaluation.report_folder import ReportFolder
from retriever.evaluation.set_settings import read_settings, unused
from retriever.evaluation.suite import Suite
from retriever.evaluation.suite_options import LowerPrecision, SuiteOptions
from retriever.utils.device import PrecisionChoice
from retriever.utils.indexes import check_index_options


@dataclass(frozen=True)
class SetMetrics:
    """The metrics of one set.

    Attributes:
        metrics: Measure, such as "ndcg@10", -> its mean over all judged queries, in [0, 1].
        queries: The Q ids of the judged queries.
        per_query: Measure -> [Q] float64 values, in the order of `queries`.
    """

    metrics: dict[str, float]
    queries: list[str]
    per_query: dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """What `retriever.evaluate` returns.

    Attributes:
        folder: Folder of the report; temporary if no `out` was given.
        checks: Set -> its size, findings and estimates, from the check before the evaluation.
        absent: Requested sets that do not exist on disk.
        result: The metrics in the form that reports are written from; None after a preflight.
    """

    folder: ReportFolder
    checks: dict[str, dict[str, Any]]
    absent: list[str]
    result: SuiteResult | None

    @cached_property
    def sets(self) -> dict[str, SetMetrics]:
        """Set (or row of BEIR's table) -> its metrics with exact search."""
        return {} if self.result is None else {name: _set_metrics(row) for name, row in self.result.rows.items()}

    @cached_property
    def index(self) -> dict[str, SetMetrics]:
        """Set -> its metrics with the index, if one was evaluated."""
        found = {} if self.result is None else self.result.approximations
        return {name: _set_metrics(other.metrics) for name, other in found.items()}

    @cached_property
    def by_dim(self) -> dict[int, dict[str, SetMetrics]]:
        """Dimension of `dims` -> set (or row of BEIR's table) -> its metrics with embeddings truncated to it."""
        sizes = [] if self.result is None else self.result.sizes
        # Those of further precisions come after the metrics of each dimension.
        return {size.dim: {name: _set_metrics(row) for name, row in size.rows.items()} for size in reversed(sizes)}

    @cached_property
    def by_size(self) -> list[tuple[int, str, int, dict[str, SetMetrics]]]:
        """(dimensions, precision, bytes of an embedding, set -> its metrics) for `dims` and `precisions`."""
        sizes = [] if self.result is None else self.result.sizes
        return [
            (size.dim, size.precision, size.bytes, {name: _set_metrics(row) for name, row in size.rows.items()})
            for size in sizes
        ]

    @property
    def metrics(self) -> dict[str, float]:
        """Measure -> unweighted mean over the sets: of one set, its own metrics."""
        means = [found.metrics for found in self.sets.values()]
        names = [name for name in (means[0] if means else {}) if all(name in mean for mean in means)]
        return {name: float(np.mean([mean[name] for mean in means])) for name in names}

    @property
    def per_query(self) -> dict[str, np.ndarray]:
        """Measure -> [Q] float64 values of the only set.

        Raises:
            ValueError: There are several sets; use `sets[name].per_query`.
        """
        if not self.sets:
            raise ValueError("expected one set, found none: a preflight gives no metrics")
        if len(self.sets) != 1:
            raise ValueError(f"expected one set, found {', '.join(self.sets)}: use sets[name].per_query")
        return next(iter(self.sets.values())).per_query

    def save(self, folder: str | Path) -> Path:
        """Copy report and run files to a new or empty folder; returns it."""
        return self.folder.save(folder)

    def __repr__(self) -> str:
        rows = (f"{name}: nDCG@10 {found.metrics.get('ndcg@10', np.nan):.4f}" for name, found in self.sets.items())
        return f"Evaluation({', '.join(rows)})"


def evaluate(
    model: ModelInput,
    data: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    split: str | None = None,
    k: int = 1000,
    home: str | Path | None = None,
    download: bool = False,
    mirror: str | None = None,
    allow_dangling: bool = False,
    keep_identical_ids: bool = False,
    settings: str | Path | None = None,
    windows: bool = False,
    overlap: int = 32,
    factory: str | None = None,
    index: str | Path | None = None,
    dtype: StoreDtype = "float32",
    shard_rows: int = 65536,
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    micro_batch_tokens: int | None = None,
    index_device: str = "auto",
    index_spread: Spread = "auto",
    dim: int | None = None,
    dims: Sequence[int] = (),
    precisions: Sequence[LowerPrecision] = (),
    preflight: bool = False,
    progress: Progress = None,
) -> Evaluation:
    """Score a model on BEIR sets: nDCG, MAP, recall, precision, MRR, capped recall and success.

    The sets are checked first. Under torchrun every process calls this function, and all share the work.

    Args:
        model: A model from `retriever.load`, or its folder or hub name.
        data: BEIR folders, folders of them, names of BEIR's sets ("scifact"), or "beir" for all of them; one or more.
            "nanobeir" and "NanoSciFact" are sets of NanoBEIR, "ir:beir/scifact/test" is one of the package ir_datasets.
        out: Folder of the report; embeddings found there are reused. Default: None, a temporary folder, from which
            `Evaluation.save` copies the report.
        split: Split of the qrels. Default: None, "test", and "dev" for MS MARCO.
        k: Passages per query in the run, and the deepest cut-off of the measures. Default: 1000.
        home: Folder of the sets that `data` names. Default: None, the working directory.
        download: Whether to download public sets that `data` names to `home`. Default: False.
        mirror: Address to download from. Default: None, BEIR's own.
        allow_dangling: Whether to accept qrels with passages (never found) or queries (score 0) that do not exist.
            Default: False.
        keep_identical_ids: Whether to rank passages that have their query's id and are not judged for it. BEIR leaves
            them out. Default: False.
        settings: YAML file with prompts and maximum lengths by set. Default: None.
        windows: Whether to score long documents by their best window. Default: False, they are truncated.
        overlap: Tokens that consecutive windows share. Default: 32.
        factory: Evaluate a FAISS index of this factory string, too. Default: None.
        index: Evaluate this index, too. Default: None.
        dtype: Dtype of the embeddings on disk. Default: "float32".
        shard_rows: Passages per shard of the store. Default: 65536.
        device: Device, if `model` is a folder or name. Default: "auto".
        precision: As for `retriever.load`, if `model` is a folder or name.
        micro_batch_tokens: As for `retriever.load`, if `model` is a folder or name.
        index_device: Where the index is searched: "cpu", "cuda:1" and so on, or "cuda" for all GPUs. Default: "auto",
            the GPU of the model if there is one and it can search the index, otherwise the CPU.
        index_spread: How several GPUs are used: "shards" or "replicas". Default: "auto", one GPU if it holds the index,
            else shards.
        dim: Keep the first `dim` values of each embedding, at unit length. Default: None, all that `model` computes.
        dims: Also give the metrics of exact search with embeddings truncated to each of these dimensions, as one table
            and plot (`Evaluation.by_dim`); the corpus is embedded once. Default: none.
        precisions: Also give, in the same table, the metrics with the passages' embeddings in "int8", in "binary"
            (1 bit per value), or "binary+int8": the 4 · k nearest by Hamming distance, ranked by int8. Queries stay
            float32. Default: none.
        preflight: Whether to only check the sets and estimate time, memory and disk. Default: False.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The metrics of each set, as means and per query.

    Raises:
        InputError: A set has errors, or the model or a file cannot be read.
        ConfigError: An argument is invalid.
    """
    data = path_list("data", data)
    if not data:
        raise ArgumentError("data", "expected at least one BEIR folder, found none")
    check_at_least(1, k=k, shard_rows=shard_rows)
    check_at_least(0, overlap=overlap)
    check_index_options(index_device, index_spread, index=index is not None or factory is not None)
    dims = _checked_dims(dim, dims)
    check_choice(get_args(StoreDtype), dtype=dtype)
    if isinstance(precisions, str) or not isinstance(precisions, Sequence):
        raise ArgumentError("precisions", f"expected a list, found {precisions!r:.60}")
    for each in precisions:
        check_choice(get_args(LowerPrecision), precisions=each)
    if precisions and dtype not in ("float32", "float16"):
        raise ArgumentError("precisions", f"expected dtype float32 or float16 with them, found {dtype}")
    if download and home is None:
        raise ArgumentError("download", "expected home, the folder to download sets to, found none")
    if mirror is not None and not download:
        raise ArgumentError("mirror", "expected together with download")
    if not isinstance(model, Model):
        check_paths(model=model)
    if index is not None:
        check_paths(index=index)
    if settings is not None:
        check_paths(settings=settings)
    if factory is not None and index is not None:
        raise ArgumentError("factory", "give a factory string or an index, not both")
    options = SuiteOptions(
        k=k,
        windows=windows,
        overlap=overlap,
        factory=factory,
        index=None if index is None else Path(index),
        index_device=index_device,
        index_spread=index_spread,
        settings=read_settings(Path(settings)) if settings else {},
        dangling=allow_dangling,
        keep_identical_ids=keep_identical_ids,
        dtype=dtype,
        shard_rows=shard_rows,
        dims=dims,
        precisions=tuple(dict.fromkeys(precisions)),
    )
    if isinstance(model, Model):
        device, precision = str(model.device), model.options.precision
        micro_batch_tokens = model.options.micro_batch_tokens
    given = flat_settings(options, without=("index",))
    given |= {"split": split, "precision": precision, "micro_batch_tokens": micro_batch_tokens}
    given |= {"index": index is not None, "preflight": preflight, "download": download, "dim": dim}
    folder = ReportFolder(out)
    with joined_ranks(same_settings("evaluate beir", device, given)) as ranks:
        if out is None and ranks.world_size > 1:
            raise ArgumentError("out", "expected a folder under torchrun, found none")
        reporter = as_reporter(progress) if ranks.is_first else SilentReporter()
        planned = _plan(data, home, split, mirror if download else None, download, ranks, reporter)
        for name in unused(options.settings, planned.tasks):
            reporter.line(f"warning: {settings}: no set here is called {name}")
        if not isinstance(model, Model):
            model = load(
                model, device=device, precision=precision, micro_batch_tokens=micro_batch_tokens, progress=reporter
            )
        model = as_model(model, dim=dim)
        if dims and max(dims) > model.dimension:
            raise ArgumentError("dims", f"expected at most {model.dimension} dimensions, found {max(dims)}")
        if dims:
            # Refuses embeddings without unit length before they are computed.
            as_model(model, dim=min(dims))
        model.towers.to(rank_device(model.device))
        suite = Suite(model.towers, planned, folder.path, model.options, options, reporter, ranks)
        checked = check_sets(
            model.towers,
            planned,
            folder.path,
            model.options,
            options,
            reporter,
            thorough=preflight,
            processes=ranks.world_size,
        )
        result = None if preflight else suite.run({"model": model.name}, checked)
    return Evaluation(folder, checked, list(planned.absent), result)


def _checked_dims(dim: int | None, dims: Sequence[int]) -> tuple[int, ...]:
    if dim is not None:
        check_at_least(1, dim=dim)
    if isinstance(dims, str | bytes) or not isinstance(dims, Sequence):
        raise ArgumentError("dims", f"expected a list of dimensions, found {dims!r:.60}")
    for each in dims:
        check_at_least(1, dims=each)
    return tuple(sorted(set(dims)))


def _plan(
    data: Sequence[str | Path],
    home: str | Path | None,
    split: str | None,
    mirror: str | None,
    download: bool,
    ranks: Ranks,
    reporter: Reporter,
) -> Plan:
    folder = None if home is None else Path(home)
    if download and ranks.is_first and folder is not None:
        public = [definition.name for definition in BEIR if definition.md5]
        for name in [name for entry in map(str, data) for name in (public if entry == WHOLE else [entry])]:
            if name in BY_NAME and not Path(name).is_dir() and not (folder / name).is_dir():
                with reporter.bar(f"download {name}", None, "bytes") as advance:
                    beir_download.download(name, folder, mirror=mirror or beir_download.MIRROR, progress=advance)
    entries = []
    for entry in map(str, data):
        names = external_names(entry)
        entries += [_external(name, folder, download, ranks, reporter) for name in names] or [entry]
    ranks.barrier()
    return plan(entries, folder, split)


def _external(name: str, home: Path | None, download: bool, ranks: Ranks, reporter: Reporter) -> str:
    """The folder of a set of NanoBEIR or ir_datasets, downloaded if it may be."""
    folder = external_folder(name, Path() if home is None else home)
    if download and home is not None and ranks.is_first and not folder.is_dir():
        with reporter.bar(f"download {name}", None, "documents") as advance:
            download_external(name, home, advance)
    if not download and not folder.is_dir():
        raise InputError(f"{name}: expected the set in {folder}; --download downloads it")
    return str(folder)


def _set_metrics(found: Metrics) -> SetMetrics:
    per_query: Mapping[str, dict[str, float]] = found.per_query
    if isinstance(per_query, PerQuery):
        arrays = {name: per_query.column(name) for name in per_query.measures}
    else:
        names = next(iter(per_query.values()), {})
        arrays = {name: np.array([values[name] for values in per_query.values()]) for name in names}
    return SetMetrics(dict(found.mean), list(per_query), arrays)
