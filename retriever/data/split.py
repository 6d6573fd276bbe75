"""Pairs of any accepted format as a BEIR folder with a train, a dev and a test set, cut between groups of queries."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from index.beir import beir_file
from index.files import InputError, atomic_folder
from index.progress import Progress, Reporter, as_reporter
from retriever.config.sources import SourceConfig
from retriever.data.false_negatives import Integers
from retriever.data.query_groups import (
    DEV,
    TEST,
    TRAIN,
    Digests,
    check_size,
    choose_splits,
    connected_groups,
    reaches,
    resolve_size,
)
from retriever.data.sources import Notices, resolve_format
from retriever.data.split_rows import SplitRows
from retriever.errors import ConfigError

By = Literal["component", "query"]
Format = Literal["auto", "beir", "jsonl", "csv", "tsv", "parquet", "huggingface"]
Splits = npt.NDArray[np.int8]
NAMES = {TRAIN: "train", DEV: "dev", TEST: "test"}


@dataclass(frozen=True)
class SplitReport:
    """What `split` made: sizes by split, and what it has to say of the data."""

    out: str
    by: By
    """How queries were split, also where that was chosen for want of enough groups."""
    seed: int
    queries: dict[str, int]
    """Split -> different query texts."""
    pairs: dict[str, int]
    """Split -> different pairs of a query and a positive."""
    rows: dict[str, int]
    """Split -> rows of the source; those of train are in train.jsonl."""
    passages: int
    """In the corpus."""
    groups: int
    """Groups of queries that pairs connect."""
    largest_group: int
    """Queries in the largest of them."""
    shared_positives: int
    """Queries of dev and test with a positive that is also one of a train query: 0 by component."""
    skipped: dict[str, int]
    """What was skipped or mended -> how often."""
    notes: list[str]
    """One line each: choices that were made, and where what was skipped came first."""


def split(
    source: str | Path,
    out: str | Path,
    *,
    dev: int | float | None = None,
    test: int | float | None = None,
    by: By | None = None,
    seed: int = 0,
    passages: str | Path | None = None,
    format: Format = "auto",
    query: str = SourceConfig.query,
    positive: str = SourceConfig.positive,
    negatives: str = SourceConfig.negatives,
    split: str = SourceConfig.split,
    progress: Progress = None,
) -> SplitReport:
    """Split pairs into a BEIR folder with train, dev and test, for training, validation and evaluation.

    No query text stands in two splits. By component, no text of a dev or test pair stands in a pair of train either:
    the queries that shared positives connect, directly or through other pairs, stay together. Texts are stripped, and
    equal when they are equal then; ids are made of the texts. The folder holds corpus.jsonl (every positive, negative
    and further passage once), queries.jsonl, qrels/train.tsv, qrels/dev.tsv, qrels/test.tsv (all pairs, of grade 1),
    and train.jsonl: the training rows with their hard negatives, for which qrels have no place. Its bytes depend on
    the rows of the source and the arguments, not on the order of the rows or the machine.

    Args:
        source: a file or folder that training reads (`SourceConfig.path`).
        out: the folder to make; it is whole or absent.
        dev: queries of the dev set, or their share of all (below 1); none: 5 %, at most 1,000; at least 1. 0 for no
            dev set. Groups are kept whole, so that there may be some more or fewer.
        test: likewise for the test set.
        by: "component", or "query" for splits that share no query but may share positives. None: by component, and by
            query, with a note, where groups are too large to give half or at most twice the sizes asked for.
        seed: of the random choice.
        passages: a corpus file (`_id`, `title`, `text`) or BEIR folder with further passages for the corpus.
        format: of the source.
        query: column of the source with the query.
        positive: column with the positive passage, or a list of them.
        negatives: column with the hard negatives; * in a name stands for several columns.
        split: of a BEIR folder or Hugging Face dataset.
        progress: Called with a `ProgressEvent` at each step. Default: None, messages go to the logger "retriever".

    Raises:
        ConfigError: an argument cannot be meant.
        InputError: the folder exists, the source or a row of it is bad, or the sizes cannot be had.
    """
    check_size("dev", dev)
    check_size("test", test)
    if by not in (None, "component", "query"):
        raise ConfigError(f"by: expected component or query, found {by!r}")
    if not str(source):
        raise ConfigError("source: expected a file or a folder, found nothing")
    config = SourceConfig(str(source), format=format, split=split, query=query, positive=positive, negatives=negatives)
    reporter = as_reporter(progress)
    out = Path(out)
    _refuse_existing(out)
    _refuse_inside(out, config)
    corpus = None if passages is None else _corpus_file(Path(passages))
    notices, known = Notices(), 0
    with atomic_folder(out) as folder, tempfile.TemporaryFile(dir=folder) as file:
        rows = SplitRows(file)
        with reporter.bar(f"read {config.path}", None, "rows") as advance:
            rows.read_source(config, notices, advance)
        if corpus is not None:
            with reporter.bar(f"read {corpus}", None, "passages") as advance:
                known = rows.read_passages(corpus, notices, advance)
        report = _split(rows, folder, config, out, dev=dev, test=test, by=by, seed=seed, reporter=reporter)
        again = {
            "pairs that come again, which qrels list once": rows.pair_count - sum(report.pairs.values()),
            "further passages skipped because their text is there already": known,
        }
        again = {what: count for what, count in again.items() if count}
        report.skipped.update(notices.counts() | again)
        lines = [*notices.lines(), *(f"{what}: {count}" for what, count in again.items())]
        report.notes.extend(f"{config.path}: {line}" for line in lines)
        # It would be replaced.
        _refuse_existing(out)
    if resolve_format(config) == "beir":
        report.notes.append(_about_beir(config, whole=corpus is not None))
    for line in report.notes:
        reporter.line(line)
    return report


def _split(
    rows: SplitRows,
    folder: Path,
    config: SourceConfig,
    out: Path,
    *,
    dev: int | float | None,
    test: int | float | None,
    by: By | None,
    seed: int,
    reporter: Reporter,
) -> SplitReport:
    queries = rows.queries.sorted()[0]
    pair_queries, positives = rows.pairs()
    of_query = np.searchsorted(queries, pair_queries)
    wanted = {DEV: resolve_size(dev, len(queries)), TEST: resolve_size(test, len(queries))}
    if sum(wanted.values()) >= len(queries):
        raise InputError(
            f"{config.path}: expected more than {wanted[DEV]:,} dev and {wanted[TEST]:,} test queries, "
            f"so that some are left for training, found {len(queries):,} different queries"
        )
    with reporter.bar("find groups of queries", len(positives), "pairs"):
        groups = connected_groups(queries, of_query, positives)
    largest = int(np.bincount(groups).max())
    chosen, splits, notes = _choose(config.path, groups, largest, queries, wanted, by, seed)
    shared = _shared_positives(splits[of_query], of_query, positives)
    if chosen == "query":
        what = "queries of dev and test have a positive that is also a positive of a train query"
        notes.append(f"{config.path}: {shared:,} {what}")
    pair_splits, row_splits = splits[of_query], splits[np.searchsorted(queries, rows.row_queries())]
    if rows.negatives:
        notes.append(
            "hard negatives of the training rows are in train.jsonl, for which qrels have no place; those of dev and "
            "test are passages of the corpus"
        )
    _write(folder, rows, (pair_queries, positives, pair_splits), row_splits, wanted, reporter)
    return SplitReport(
        out=str(out),
        by=chosen,
        seed=seed,
        queries=_counts(splits),
        pairs=_counts(pair_splits),
        rows=_counts(row_splits),
        passages=len(rows.passages.sorted()[0]),
        groups=int(groups.max()) + 1,
        largest_group=largest,
        shared_positives=shared,
        skipped={},
        notes=notes,
    )


def _choose(
    name: str, groups: Integers, largest: int, queries: Digests, wanted: dict[int, int], by: By | None, seed: int
) -> tuple[By, Splits, list[str]]:
    """How queries are split, the split of each, and what there is to say of that."""
    share = f"the largest group of queries that share positives holds {largest / len(queries):.1%} of all queries"
    notes: list[str] = []
    if by != "query":
        splits = choose_splits(groups, queries, wanted[DEV], wanted[TEST], seed)
        counts = np.bincount(splits, minlength=3)
        found = " and ".join(
            f"{counts[each]:,} {NAMES[each]} queries ({wanted[each]:,} wanted)" for each in (DEV, TEST)
        )
        if counts[TRAIN] and all(reaches(int(counts[each]), wanted[each]) for each in (DEV, TEST)):
            if any(counts[each] != wanted[each] for each in (DEV, TEST)):
                notes.append(f"{name}: groups are kept whole: {found}")
            if largest > len(queries) / 2 and (splits[groups == np.bincount(groups).argmax()] == TRAIN).all():
                notes.append(f"{name}: {share} and stays in train whole (--by query draws dev and test from it too)")
            return "component", splits, notes
        found = f"{name}: whole groups give {found} and leave {counts[TRAIN]:,} for training: {share}"
        if by == "component":
            raise InputError(f"{found}; ask for fewer, or split with --by query")
        notes.append(f"{found}; split by query text instead, as --by query does")
    return "query", choose_splits(np.arange(len(queries)), queries, wanted[DEV], wanted[TEST], seed), notes


def _shared_positives(splits: Splits, of_query: Integers, positives: Digests) -> int:
    trained = np.isin(positives, positives[splits == TRAIN])
    return len(np.unique(of_query[(splits != TRAIN) & trained]))


def _counts(splits: Splits) -> dict[str, int]:
    counts = np.bincount(splits, minlength=3).tolist()
    return {name: counts[split] for split, name in NAMES.items()}


def _write(
    folder: Path,
    rows: SplitRows,
    pairs: tuple[Digests, Digests, Splits],
    row_splits: Splits,
    wanted: dict[int, int],
    reporter: Reporter,
) -> None:
    queries, passages = rows.queries.sorted(), rows.passages.sorted()
    starts, lengths = rows.row_spans()
    training = row_splits == TRAIN
    total = len(queries[0]) + len(passages[0]) + len(pairs[0]) + int(training.sum())
    (folder / "qrels").mkdir()
    with reporter.bar("write", total, "lines") as advance:
        for name, letter, texts in (("corpus", "p", passages), ("queries", "q", queries)):
            lines = (
                b'{"_id": "%b%016x", "text": %b}\n' % (letter.encode(), digest, text)
                for digest, text in zip(texts[0].tolist(), rows.read(*texts[1:]), strict=True)
            )
            _write_lines(folder / f"{name}.jsonl", lines, advance)
        for split, name in NAMES.items():
            # Of a set that was not asked for there is no file: an empty one is no qrels.
            if wanted.get(split) != 0:
                listed = zip(*(column[pairs[2] == split].tolist() for column in pairs[:2]), strict=True)
                judged = (b"q%016x\tp%016x\t1\n" % pair for pair in listed)
                head = b"query-id\tcorpus-id\tscore\n"
                _write_lines(folder / "qrels" / f"{name}.tsv", judged, advance, head=head)
        examples = (line + b"\n" for line in rows.read(starts[training], lengths[training]))
        _write_lines(folder / "train.jsonl", examples, advance)


def _write_lines(path: Path, lines: Iterable[bytes], progress: Callable[[int], None], head: bytes = b"") -> None:
    with open(path, "wb") as stream:
        stream.write(head)
        for line in lines:
            stream.write(line)
            progress(1)


def _about_beir(config: SourceConfig, whole: bool) -> str:
    taken = f"{config.path}: pairs of a grade above 0 in qrels/{config.split}.tsv were taken, as grade 1"
    return taken if whole else f"{taken}, and no other passages (--passages {config.path} takes all)"


def _corpus_file(path: Path) -> Path:
    return beir_file(path, "corpus.jsonl") if path.is_dir() else path


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise InputError(f"{out}: expected a folder that does not exist yet, found one; remove it or name another")


def _refuse_inside(out: Path, config: SourceConfig) -> None:
    """Every file of a Hugging Face folder may be read as data, so nothing is written into one."""
    source = Path(config.path)
    if source.resolve() in out.resolve().parents and resolve_format(config) == "huggingface":
        raise ConfigError(f"{out}: expected a folder outside of the source {source}")
