"""Validation of the sets of an evaluation, and an estimate of its cost, before the model encodes them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.sets.estimate import Estimate, Lengths, estimate, warn_of_lengths
from eval.sets.plan import Plan, Task
from eval.sets.preflight import Preflight, preflight
from index.ann.factory import choose, make, memory
from index.ann.layout import FAISS_FILE
from index.ann.settings import core
from index.beir import beir_file
from index.files import InputError
from index.manifest import INDEX, read_manifest
from index.progress import Reporter
from index.records import count_records
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.evaluation.set_settings import towers_for
from retriever.models.towers import SIDES, Side, Towers

if TYPE_CHECKING:
    from retriever.evaluation.suite_options import SuiteOptions

# Smaller corpora are encoded faster than the speed of the model is measured.
MIN_PASSAGES_TO_ESTIMATE = 2000
# Duration of the speed measurement.
TRIAL_SECONDS = 5.0


def check_sets(
    towers: Towers,
    plan: Plan,
    out: Path,
    encode: EncodeOptions,
    options: SuiteOptions,
    reporter: Reporter,
    *,
    thorough: bool = False,
    processes: int = 1,
) -> dict[str, dict[str, Any]]:
    """Validate every set and print its findings, text lengths and estimated cost.

    Args:
        towers: the model in evaluation mode, on the device to use.
        plan: the sets.
        out: the folder of the report, for the free disk space.
        encode: precision and micro-batch size.
        options: options of the evaluation.
        reporter: prints the findings.
        thorough: print lengths and an estimate for small sets too.
        processes: number of processes that share the encoding.

    Returns:
        Set -> its counts, findings and estimate, for JSON.

    Raises:
        InputError: a set has errors, or there is no set.
    """
    if not plan.tasks:
        raise InputError(f"expected at least one set that is on disk, found none of {', '.join(plan.absent)}")
    results = []
    for task in plan.tasks:
        with reporter.bar(f"{task.name}: check", _passages(task) if reporter.is_live else None, "passages") as advance:
            result = preflight(
                task.folder,
                task.split,
                name=task.name,
                dangling=options.dangling,
                keep_identical_ids=options.keep_identical_ids,
                progress=advance,
            )
        if result.passages:
            _check_factory(result, options, towers.dimension)
        results.append(result)
    reports = {}
    has_errors = any(result.errors for result in results)
    for task, result in zip(plan.tasks, results, strict=True):
        adjusted = towers_for(towers, options.settings, task.name, task.row)
        lengths: dict[str, Lengths] = {side: _lengths(adjusted, side, result) for side in SIDES}
        if not options.windows:
            warn_of_lengths(result, lengths)
        _print_findings(task, result, reporter)
        reports[task.name] = _json(result, lengths)
        if not has_errors and (thorough or result.passages >= MIN_PASSAGES_TO_ESTIMATE):
            cost = estimate(
                result,
                lengths,
                dim=adjusted.dimension,
                k=options.k,
                out=out.absolute(),
                tokens_per_second=processes * _speed(adjusted, result.passage_sample, lengths["document"], encode),
                dtype_bytes={"float32": 4, "float16": 2}.get(options.dtype, 1),
                shard_rows=options.shard_rows,
                index=_index_bytes(options, result.passages, adjusted.dimension),
                build=options.factory is not None,
            )
            reports[task.name]["estimate"] = dataclasses.asdict(cost)
            _print_estimate(lengths, cost, out, reporter)
    for result in results:
        result.refuse()
    return reports


def _check_factory(result: Preflight, options: SuiteOptions, dim: int) -> None:
    """Add an error if the corpus has too few passages to train the index; windows are not counted before encoding."""
    if options.factory is None or options.factory == "auto" or options.windows:
        return
    # The variable keeps the index alive: `core` returns a reference into it.
    index = make(options.factory, dim)
    inner = core(index)
    centroids = max(getattr(inner, "nlist", 0), inner.pq.ksub if hasattr(inner, "pq") else 0)
    if result.passages < centroids:
        what = f"expected at least {centroids:,} passages to train as many centroids, found {result.passages:,}"
        place = f"{result.name}: factory {options.factory!r}: {what}; choose fewer, or 'Flat'"
        result.add("too few passages for the index", place, error=True)


def _index_bytes(options: SuiteOptions, rows: int, dim: int) -> int:
    """Memory of the requested index in bytes; 0 without one."""
    if options.index is not None:
        return read_manifest(options.index, INDEX).files[FAISS_FILE].bytes
    if options.factory is None:
        return 0
    return memory(choose(rows, dim) if options.factory == "auto" else options.factory, rows, dim)


def _passages(task: Task) -> int | None:
    """Approximate number of passages; None if the corpus is missing, which the validation reports."""
    try:
        return count_records(beir_file(task.folder, "corpus.jsonl"))
    except (InputError, OSError):
        return None


def _print_findings(task: Task, result: Preflight, reporter: Reporter) -> None:
    counts = f"{result.passages:,} passages, {result.queries:,} queries, {result.judgements:,} judgements"
    errors, warnings = (sum(finding.count for finding in kind) for kind in (result.errors, result.warnings))
    reporter.line(f"{task.name} ({task.split}): {counts}; {errors:,} errors, {warnings:,} warnings")
    for kind, findings in (("error", result.errors), ("warning", result.warnings)):
        for finding in findings:
            reporter.line(f"  {kind}: {finding}")


def _print_estimate(lengths: dict[str, Lengths], cost: Estimate, out: Path, reporter: Reporter) -> None:
    for side in SIDES:
        reporter.line(f"  {side} lengths: {lengths[side]}")
    reporter.line(f"  estimate: {cost}")
    if cost.disk > cost.free:
        reporter.line(f"  warning: not enough space on the disk of {out}")


def _json(result: Preflight, lengths: dict[str, Lengths]) -> dict[str, Any]:
    return {
        "passages": result.passages,
        "queries": result.queries,
        "judgements": result.judgements,
        "errors": {finding.what: finding.count for finding in result.errors},
        "warnings": {finding.what: finding.count for finding in result.warnings},
        "tokens": {side: lengths[side].histogram() for side in SIDES},
    }


def _lengths(towers: Towers, side: Side, result: Preflight) -> Lengths:
    """Token counts of the sampled texts with prompt and special tokens, before truncation."""
    texts = result.query_sample if side == "query" else result.passage_sample
    tokenizer = towers.tokenizer(side)
    if not texts:
        return Lengths(np.empty(0, np.int64), tokenizer.max_length)
    prompt = towers.prompt(side)
    return Lengths(tokenizer.untruncated([prompt + text for text in texts]).lengths, tokenizer.max_length)


def _speed(towers: Towers, texts: Sequence[str], lengths: Lengths, options: EncodeOptions) -> float:
    """Measure the encoding speed in tokens per second on sampled texts, for up to TRIAL_SECONDS.

    The number of texts grows from call to call. Only the last and largest call counts, because small batches are
    slower per token.
    """
    limit = lengths.limit or int(lengths.counts.max(initial=1))
    embed_texts(towers, texts[:2], "document", options)  # warm-up
    count, remaining = min(2, len(texts)), TRIAL_SECONDS
    while True:
        start = time.perf_counter()
        embed_texts(towers, texts[:count], "document", options)
        seconds = max(time.perf_counter() - start, 1e-6)
        remaining -= seconds
        growth = min(4.0, remaining / seconds)
        if growth <= 1 or count == len(texts):
            return float(lengths.counts[:count].clip(max=limit).sum()) / seconds
        count = min(len(texts), math.ceil(growth * count))
