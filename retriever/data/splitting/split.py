"""Splitting pairs of any supported format into a BEIR folder with a train, a dev and a test set."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from index.beir import beir_file
from index.files import InputError, atomic_folder
from index.progress import Progress, Reporter, as_reporter
from retriever.config.sources import PairFormat, SourceConfig
from retriever.data.false_negatives import Integers
from retriever.data.sources import Notices, resolve_format
from retriever.data.splitting.query_groups import (
    DEV,
    TEST,
    TRAIN,
    Digests,
    check_size,
    choose_splits,
    connected_groups,
    is_large_enough,
    resolve_size,
)
from retriever.data.splitting.rows import SplitRows
from retriever.errors import ArgumentError, check_at_least, check_choice, check_paths

By = Literal["component", "query"]
Splits = npt.NDArray[np.int8]
NAMES = {TRAIN: "train", DEV: "dev", TEST: "test"}


@dataclass(frozen=True)
class SplitReport:
    """The result of `split`: sizes of the splits, and notes about the data."""

    out: str
    """The folder that was written."""
    by: By
    """How queries were split: as requested, or "query" if the groups were too large."""
    seed: int
    queries: dict[str, int]
    """Split -> number of distinct queries."""
    pairs: dict[str, int]
    """Split -> number of distinct pairs of a query and a positive."""
    rows: dict[str, int]
    """Split -> number of rows of the source. The rows of train are in train.jsonl."""
    passages: int
    """Number of passages in the corpus."""
    groups: int
    """Number of groups of queries that are connected by pairs."""
    largest_group: int
    """Number of queries in the largest group."""
    shared_positives: int
    """Number of dev and test queries with a positive that is also a positive of a train query; 0 by component."""
    skipped: dict[str, int]
    """What was skipped or corrected -> number of times."""
    notes: list[str]
    """Lines about decisions and about skipped rows."""


@dataclass(frozen=True)
class _Request:
    """The arguments of `split` that determine the choice of the queries."""

    dev: int | float | None
    test: int | float | None
    by: By | None
    seed: int


def split(
    source: str | Path,
    out: str | Path,
    *,
    dev: int | float | None = None,
    test: int | float | None = None,
    by: By | None = None,
    seed: int = 0,
    passages: str | Path | None = None,
    format: PairFormat = "auto",
    query: str = SourceConfig.query,
    positive: str = SourceConfig.positive,
    negatives: str = SourceConfig.negatives,
    split: str = SourceConfig.split,
    progress: Progress = None,
) -> SplitReport:
    """Split pairs into a BEIR folder with a train, a dev and a test set.

    No query is in two splits. With `by="component"`, no text of a dev or test pair is in a train pair either: queries
    that are connected by shared positives, directly or through other pairs, are in the same split. Texts are compared
    after stripping white space. Ids are derived from the texts.

    The folder has these files: corpus.jsonl (positives, negatives and further passages), queries.jsonl,
    qrels/train.tsv, qrels/dev.tsv and qrels/test.tsv (all pairs with grade 1), and train.jsonl (the training rows with
    their hard negatives, which qrels cannot express, but without scores and prompts). Their content depends only on
    the rows of the source and the arguments, not on the order of the rows or on the machine.

    Args:
        source: A file, folder or hub name in a format that training reads (`SourceConfig.path`).
        out: Folder to create. It is not created if an error occurs.
        dev: Number of dev queries, or a fraction of all queries in (0, 1). 0: no dev set. Default: 5 %, at least 1 and
            at most 1,000. Groups are not divided, so the number may differ.
        test: Number or fraction of test queries, as `dev`.
        by: "component", or "query" for splits that may share positives. Default: None, "component" unless the groups
            are too large to give at least half and at most twice the requested sizes; then "query", with a note.
        seed: Seed of the random choice. Default: 0.
        passages: A corpus file (`_id`, `title`, `text`) or BEIR folder with further passages for the corpus.
        format: Format of the source. Default: "auto".
        query: Column of the query.
        positive: Column of the positive passage, or of a list of them.
        negatives: Column of the hard negatives. With * it may match several columns.
        split: Split of a BEIR folder or Hugging Face dataset.
        progress: Called with a `ProgressEvent` at each step. Default: None, messages go to the logger "retriever".

    Returns:
        Sizes of the splits and notes.

    Raises:
        ConfigError: If an argument is invalid.
        InputError: If the folder exists, the source or a row is invalid, or the sizes are not possible.
    """
    check_size("dev", dev)
    check_size("test", test)
    if by is not None:
        check_choice(get_args(By), by=by)
    check_choice(get_args(PairFormat), format=format)
    check_at_least(0, seed=seed)
    check_paths(source=source, out=out)
    if passages is not None:
        check_paths(passages=passages)
    config = SourceConfig(
        str(source), format=format, split=split, query=query, positive=positive, negatives=negatives, scores=""
    )
    reporter = as_reporter(progress)
    out = Path(out)
    _refuse_existing(out)
    _refuse_inside(out, config)
    corpus = None if passages is None else _corpus_file(Path(passages))
    notices, duplicates = Notices(), 0
    with atomic_folder(out) as folder, tempfile.TemporaryFile(dir=folder) as file:
        rows = SplitRows(file)
        with reporter.bar(f"read {config.path}", None, "rows") as advance:
            rows.read_source(config, notices, advance)
        if corpus is not None:
            with reporter.bar(f"read {corpus}", None, "passages") as advance:
                duplicates = rows.read_passages(corpus, notices, advance)
        report = _split(rows, folder, config, out, _Request(dev, test, by, seed), reporter)
        repeated = {
            "repeated pairs, which qrels list once": rows.pair_count - sum(report.pairs.values()),
            "further passages skipped because their text is already present": duplicates,
        }
        repeated = {kind: count for kind, count in repeated.items() if count}
        report.skipped.update(notices.counts() | repeated)
        lines = [*notices.lines(), *(f"{kind}: {count}" for kind, count in repeated.items())]
        report.notes.extend(f"{config.path}: {line}" for line in lines)
        # Checked again, because `atomic_folder` would replace a folder that was created meanwhile.
        _refuse_existing(out)
    if resolve_format(config) == "beir":
        report.notes.append(_describe_beir_source(config, has_corpus=corpus is not None))
    for line in report.notes:
        reporter.line(line)
    return report


def _split(
    rows: SplitRows, folder: Path, config: SourceConfig, out: Path, request: _Request, reporter: Reporter
) -> SplitReport:
    queries = rows.queries.sorted()[0]
    pair_queries, positives = rows.pairs()
    query_rows = np.searchsorted(queries, pair_queries)
    sizes = {DEV: resolve_size(request.dev, len(queries)), TEST: resolve_size(request.test, len(queries))}
    if sum(sizes.values()) >= len(queries):
        raise InputError(
            f"{config.path}: expected more than {sizes[DEV]:,} dev and {sizes[TEST]:,} test queries, "
            f"so that some are left for training, found {len(queries):,} different queries"
        )
    with reporter.bar("find groups of queries", len(positives), "pairs"):
        groups = connected_groups(queries, query_rows, positives)
    largest = int(np.bincount(groups).max())
    by, splits, notes = _choose(config.path, groups, queries, sizes, request)
    shared = _shared_positives(splits[query_rows], query_rows, positives)
    if by == "query":
        notes.append(
            f"{config.path}: {shared:,} queries of dev and test have a positive that is also a positive of a train "
            "query"
        )
    pair_splits, row_splits = splits[query_rows], splits[np.searchsorted(queries, rows.row_queries())]
    if rows.negatives:
        notes.append(
            "hard negatives of the training rows are in train.jsonl, because qrels cannot express them; those of dev "
            "and test are passages of the corpus"
        )
    _write(folder, rows, (pair_queries, positives, pair_splits), row_splits, sizes, reporter)
    return SplitReport(
        out=str(out),
        by=by,
        seed=request.seed,
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
    name: str, groups: Integers, queries: Digests, sizes: dict[int, int], request: _Request
) -> tuple[By, Splits, list[str]]:
    """Return how queries are split, the split of each query, and notes."""
    group_sizes = np.bincount(groups)
    largest = int(group_sizes.max())
    share = f"the largest group of queries that share positives has {largest / len(queries):.1%} of all queries"
    notes: list[str] = []
    if request.by != "query":
        splits = choose_splits(groups, queries, sizes[DEV], sizes[TEST], request.seed)
        counts = np.bincount(splits, minlength=3)
        result = " and ".join(
            f"{counts[split]:,} {NAMES[split]} queries ({sizes[split]:,} requested)" for split in (DEV, TEST)
        )
        if counts[TRAIN] and all(is_large_enough(int(counts[split]), sizes[split]) for split in (DEV, TEST)):
            if any(counts[split] != sizes[split] for split in (DEV, TEST)):
                notes.append(f"{name}: groups are not divided: {result}")
            if largest > len(queries) / 2 and (splits[groups == group_sizes.argmax()] == TRAIN).all():
                notes.append(f"{name}: {share} and is entirely in train (--by query also draws dev and test from it)")
            return "component", splits, notes
        problem = f"{name}: undivided groups give {result} and leave {counts[TRAIN]:,} for training: {share}"
        if request.by == "component":
            raise InputError(f"{problem}; request fewer, or split with --by query")
        notes.append(f"{problem}; split by query text instead, as with --by query")
    return "query", choose_splits(np.arange(len(queries)), queries, sizes[DEV], sizes[TEST], request.seed), notes


def _shared_positives(splits: Splits, query_rows: Integers, positives: Digests) -> int:
    """Return the number of dev and test queries with a positive of a train query."""
    in_train = np.isin(positives, positives[splits == TRAIN])
    return len(np.unique(query_rows[(splits != TRAIN) & in_train]))


def _counts(splits: Splits) -> dict[str, int]:
    counts = np.bincount(splits, minlength=3).tolist()
    return {name: counts[split] for split, name in NAMES.items()}


def _write(
    folder: Path,
    rows: SplitRows,
    pairs: tuple[Digests, Digests, Splits],
    row_splits: Splits,
    sizes: dict[int, int],
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
            # Empty qrels are invalid, so there is no file for a set of size 0.
            if sizes.get(split) != 0:
                selected = zip(*(column[pairs[2] == split].tolist() for column in pairs[:2]), strict=True)
                lines = (b"q%016x\tp%016x\t1\n" % pair for pair in selected)
                header = b"query-id\tcorpus-id\tscore\n"
                _write_lines(folder / "qrels" / f"{name}.tsv", lines, advance, header=header)
        examples = (line + b"\n" for line in rows.read(starts[training], lengths[training]))
        _write_lines(folder / "train.jsonl", examples, advance)


def _write_lines(path: Path, lines: Iterable[bytes], progress: Callable[[int], None], header: bytes = b"") -> None:
    with open(path, "wb") as stream:
        stream.write(header)
        for line in lines:
            stream.write(line)
            progress(1)


def _describe_beir_source(config: SourceConfig, has_corpus: bool) -> str:
    line = f"{config.path}: pairs with a grade above 0 in qrels/{config.split}.tsv were used, with grade 1"
    return line if has_corpus else f"{line}, and no other passages (--passages {config.path} adds all)"


def _corpus_file(path: Path) -> Path:
    return beir_file(path, "corpus.jsonl") if path.is_dir() else path


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise InputError(f"{out}: expected a folder that does not exist yet, found one; remove it or name another")


def _refuse_inside(out: Path, config: SourceConfig) -> None:
    """Refuse to write into a Hugging Face folder, because every file in it may be read as data."""
    source = Path(config.path)
    if source.resolve() in out.resolve().parents and resolve_format(config) == "huggingface":
        raise ArgumentError("out", f"expected a folder outside of the source {source}, found {out}")
