"""What is wrong with the sets of an evaluation, and what it will take: said before the model embeds them."""

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
    from retriever.evaluation.suite import SuiteOptions

# Corpora below this are done before a trial of the model's speed would be.
WORTH_A_TRIAL = 2000
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
    """Read every set, print its findings, lengths and estimate.

    Args:
        thorough: print lengths and an estimate of small sets too.
        processes: how many share the encoding.

    Returns:
        Set -> its numbers, findings and estimate, for JSON.

    Raises:
        InputError: a set has errors, or there is none.
    """
    if not plan.tasks:
        raise InputError(f"expected at least one set that is here, found none of {', '.join(plan.absent)}")
    found = []
    for task in plan.tasks:
        with reporter.bar(f"{task.name}: check", _passages(task) if reporter.is_live else None, "passages") as advance:
            of_set = preflight(
                task.folder,
                task.split,
                name=task.name,
                dangling=options.dangling,
                keep_identical_ids=options.keep_identical_ids,
                progress=advance,
            )
        if of_set.passages:
            _check_factory(of_set, options, towers.dimension)
        found.append(of_set)
    reports = {}
    broken = any(of_set.errors for of_set in found)
    for task, of_set in zip(plan.tasks, found, strict=True):
        own = towers_for(towers, options.settings, task.name, task.row)
        lengths: dict[str, Lengths] = {side: _lengths(own, side, of_set) for side in SIDES}
        if not options.windows:
            warn_of_lengths(of_set, lengths)
        _print_findings(task, of_set, reporter)
        reports[task.name] = _json(of_set, lengths)
        if not broken and (thorough or of_set.passages >= WORTH_A_TRIAL):
            expected = estimate(
                of_set,
                lengths,
                dim=own.dimension,
                k=options.k,
                out=out.absolute(),
                tokens_per_second=processes * _speed(own, of_set.passage_sample, lengths["document"], encode),
                dtype_bytes=2 if options.dtype == "float16" else 4,
                shard_rows=options.shard_rows,
                index=_index_bytes(options, of_set.passages, own.dimension),
                build=options.factory is not None,
            )
            reports[task.name]["estimate"] = dataclasses.asdict(expected)
            _print_estimate(lengths, expected, out, reporter)
    for of_set in found:
        of_set.refuse()
    return reports


def _check_factory(found: Preflight, options: SuiteOptions, dim: int) -> None:
    """Count as an error that an index cannot be trained on so few passages; of windows there may be more."""
    if options.factory is None or options.factory == "auto" or options.windows:
        return
    # Named, so that it lives while its parts are looked at.
    whole = make(options.factory, dim)
    inner = core(whole)
    least = max(getattr(inner, "nlist", 0), inner.pq.ksub if hasattr(inner, "pq") else 0)
    if found.passages < least:
        what = f"expected at least {least:,} passages to train as many centroids, found {found.passages:,}"
        place = f"{found.name}: factory {options.factory!r}: {what}; choose fewer, or 'Flat'"
        found.add("too few passages for the index", place, error=True)


def _index_bytes(options: SuiteOptions, rows: int, dim: int) -> int:
    """What the index asked for takes in memory; 0 where none is asked for."""
    if options.index is not None:
        return read_manifest(options.index, INDEX).files[FAISS_FILE].bytes
    if options.factory is None:
        return 0
    return memory(choose(rows, dim) if options.factory == "auto" else options.factory, rows, dim)


def _passages(task: Task) -> int | None:
    """About how many there are; none where the corpus is missing, which the check will say."""
    try:
        return count_records(beir_file(task.folder, "corpus.jsonl"))
    except (InputError, OSError):
        return None


def _print_findings(task: Task, found: Preflight, reporter: Reporter) -> None:
    counts = f"{found.passages:,} passages, {found.queries:,} queries, {found.judgements:,} judgements"
    errors, warnings = (sum(finding.count for finding in kind) for kind in (found.errors, found.warnings))
    reporter.line(f"{task.name} ({task.split}): {counts}; {errors:,} errors, {warnings:,} warnings")
    for kind, findings in (("error", found.errors), ("warning", found.warnings)):
        for finding in findings:
            reporter.line(f"  {kind}: {finding}")


def _print_estimate(lengths: dict[str, Lengths], expected: Estimate, out: Path, reporter: Reporter) -> None:
    for side in SIDES:
        reporter.line(f"  {side} lengths: {lengths[side]}")
    reporter.line(f"  estimate: {expected}")
    if expected.disk > expected.free:
        reporter.line(f"  warning: not enough room on the disk of {out}")


def _json(found: Preflight, lengths: dict[str, Lengths]) -> dict[str, Any]:
    return {
        "passages": found.passages,
        "queries": found.queries,
        "judgements": found.judgements,
        "errors": {finding.what: finding.count for finding in found.errors},
        "warnings": {finding.what: finding.count for finding in found.warnings},
        "tokens": {side: lengths[side].histogram() for side in SIDES},
    }


def _lengths(towers: Towers, side: Side, found: Preflight) -> Lengths:
    """Token counts of a sample of texts as the model would read them, but not cut."""
    texts = found.query_sample if side == "query" else found.passage_sample
    tokens = towers.tokenizer(side)
    if not texts:
        return Lengths(np.empty(0, np.int64), tokens.max_length)
    prompt = towers.prompt(side)
    return Lengths(tokens.untruncated([prompt + text for text in texts]).lengths, tokens.max_length)


def _speed(towers: Towers, texts: Sequence[str], lengths: Lengths, options: EncodeOptions) -> float:
    """Tokens that the model reads in a second, tried on texts of a sample: as many as some seconds take.

    More and more at once: few go slower through a model than many, so the last and largest trial alone counts.
    """
    limit = lengths.limit or int(lengths.counts.max(initial=1))
    embed_texts(towers, texts[:2], "document", options)  # the first call is slower than any other
    count, left = min(2, len(texts)), TRIAL_SECONDS
    while True:
        began = time.perf_counter()
        embed_texts(towers, texts[:count], "document", options)
        seconds = max(time.perf_counter() - began, 1e-6)
        left -= seconds
        more = min(4.0, left / seconds)
        if more <= 1 or count == len(texts):
            return float(lengths.counts[:count].clip(max=limit).sum()) / seconds
        count = min(len(texts), math.ceil(more * count))
