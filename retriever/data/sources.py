"""Reading training examples row by row from BEIR folders, files of rows and Hugging Face datasets."""

from __future__ import annotations

import fnmatch
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.files import InputError
from index.records import SUFFIXES, Record, read_records
from retriever.config.sources import SourceConfig

# What `datasets` raises for a folder with damaged metadata or tables.
DAMAGED_DATASET = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
LONG_TEXT = 2**20
"""Number of characters above which a text is reported: a tower reads only its beginning."""


@dataclass(frozen=True)
class Example:
    """A training example: one query, at least one positive, any number of hard negatives. No text is empty."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    """A teacher's score of each positive and then of each negative; None if the row has none."""
    query_prompt: str | None = None
    """The prompt of this row's query; None: that of the source."""
    passage_prompt: str | None = None
    """The prompt of this row's passages; None: that of the source."""


class Notices:
    """Counts of skipped rows, corrected texts and similar events of reading, with the first location of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, location: str) -> None:
        """Count an event of a kind, such as "rows skipped for an empty query", at a location ("train.jsonl:17")."""
        self._counts[kind] += 1
        self._first.setdefault(kind, location)

    def count(self, prefix: str) -> int:
        """Return the number of events of all kinds that start with `prefix`."""
        return sum(count for kind, count in self._counts.items() if kind.startswith(prefix))

    def counts(self) -> dict[str, int]:
        """Return kind -> number of events."""
        return dict(self._counts)

    def lines(self) -> list[str]:
        """Return a line for each kind: "rows skipped for an empty query: 3 (first at train.jsonl:17)"."""
        return [f"{kind}: {count} (first at {self._first[kind]})" for kind, count in self._counts.items()]


def resolve_format(config: SourceConfig) -> str:
    """Return the format of a source; for "auto" it is determined from the path.

    Raises:
        InputError: If the path does not exist, has no known format, or another one than the configuration states.
    """
    path = Path(config.path)
    if config.format in ("beir", "huggingface"):
        return config.format
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder (for a dataset of the Hugging Face hub, set its format to huggingface)"
        )
    if path.is_dir():
        detected = "beir" if _find(path, "corpus.jsonl") or _find(path, "qrels") else "huggingface"
    else:
        detected = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if config.format not in ("auto", detected):
        raise InputError(f"{path}: expected a file ending in .{config.format}, as its format says, found {detected}")
    return detected


def source_files(config: SourceConfig) -> list[Path]:
    """Return the files of a source; an empty list for a name on the Hugging Face hub."""
    path = Path(config.path)
    if not path.is_dir():
        return [path] if path.exists() else []
    if resolve_format(config) == "huggingface":
        return sorted(file for file in path.rglob("*") if file.is_file())
    names = ("corpus.jsonl", "queries.jsonl", f"qrels/{config.split}.tsv")
    return [file for name in names if (file := _find(path, name))]


def read_examples(config: SourceConfig, notices: Notices) -> Iterator[Example]:
    """Yield the examples of a source, in constant memory.

    Rows with an empty query or without a positive are skipped. Negatives that are also positives of their row are
    removed. Both are counted in `notices`, as are corrected and very long texts.

    Args:
        config: The source.
        notices: Receives the counts.

    Raises:
        InputError: If a file, a column or a passage of the qrels is missing, or a cell is not a text.
    """
    format_ = resolve_format(config)
    if format_ == "beir":
        records = _beir_records(config)
    elif format_ == "huggingface":
        records = _huggingface_records(config)
    else:
        records = read_records(Path(config.path))
    has_negatives, has_scores, record = False, False, None
    for record in records:
        columns = _negative_columns(config, record)
        has_negatives |= bool(columns)
        has_scores |= bool(_score_columns(config, record))
        example = _parse(config, record, columns, notices)
        if example is not None:
            yield example
    if record is not None and not has_negatives and config.negatives != SourceConfig.negatives:
        raise InputError(f"{config.path}: expected a column '{config.negatives}' for negatives, found none in any row")
    if record is not None and not has_scores and config.scores not in ("", SourceConfig.scores):
        raise InputError(f"{config.path}: expected a column '{config.scores}' for scores, found none in any row")


def parse_example(config: SourceConfig, record: Record, notices: Notices) -> Example | None:
    """Return the example of a record, or None if its query or positive is empty. See `read_examples`."""
    return _parse(config, record, _negative_columns(config, record), notices)


def _find(folder: Path, name: str) -> Path | None:
    """Return the path of a file, or of the file with the additional suffix .gz, if it exists."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _negative_columns(config: SourceConfig, record: Record) -> list[str]:
    return _matching(config.negatives, record)


def _score_columns(config: SourceConfig, record: Record) -> list[str]:
    return [column for name in config.scores.split(",") for column in _matching(name.strip(), record)]


def _matching(name: str, record: Record) -> list[str]:
    """Return the columns of a name, which may contain *."""
    if "*" in name:
        return [column for column in record.fields if fnmatch.fnmatchcase(column, name)]
    return [name] if name in record.fields else []


def _parse(config: SourceConfig, record: Record, negative_columns: list[str], notices: Notices) -> Example | None:
    for column in (config.query, config.positive):
        if column not in record.fields:
            raise InputError(
                f"{record.place}: expected a column '{column}', found {', '.join(record.fields) or 'none'}"
            )
    queries = _texts(record, config.query, notices, lists=False)
    positives = _texts(record, config.positive, notices)
    if not queries or not positives:
        empty_column = "positive" if queries else "query"
        notices.add(f"rows skipped for an empty {empty_column}", record.place)
        return None
    negatives = [text for column in negative_columns for text in _texts(record, column, notices)]
    true_negatives = dict.fromkeys(text for text in negatives if text not in positives)
    if len(true_negatives) < len(set(negatives)):
        notices.add("rows with a negative dropped because it is one of their positives", record.place)
    unique = [*dict.fromkeys(positives), *true_negatives]
    prompts = [
        None if column is None else _prompt(record, column)
        for column in (config.query_prompt_column, config.passage_prompt_column)
    ]
    return Example(
        queries[0],
        tuple(unique[: len(unique) - len(true_negatives)]),
        tuple(true_negatives),
        _scores(config, record, [*positives, *negatives], unique),
        *prompts,
    )


def _scores(config: SourceConfig, record: Record, texts: list[str], unique: list[str]) -> tuple[float, ...] | None:
    """Return the scores of the `unique` texts; those in the columns belong to `texts`. None for a row without scores.

    A text that occurs twice has its first score.
    """
    columns = _score_columns(config, record)
    scores: list[float] = []
    for column in columns:
        cell = record.fields[column]
        for value in cell if isinstance(cell, list) else [cell]:
            if value is None or value == "":
                continue
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise InputError(
                    f"{record.place}: expected finite numbers in column '{column}', found {value!r:.40} "
                    "(scores: '' in data.sources reads no scores)"
                )
            scores.append(number)
    if not scores:
        return None
    if len(scores) != len(texts):
        raise InputError(
            f"{record.place}: expected {len(texts)} scores in {config.scores}, one for each positive and negative, "
            f"found {len(scores)}"
        )
    first = dict(zip(reversed(texts), reversed(scores), strict=True))
    return tuple(first[text] for text in unique)


def _prompt(record: Record, column: str) -> str | None:
    if column not in record.fields:
        raise InputError(f"{record.place}: expected a column '{column}', found {', '.join(record.fields) or 'none'}")
    prompt = record.fields[column]
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"{record.place}: expected text in column '{column}', found {type(prompt).__name__}")
    return None if prompt is None else prompt.replace("\0", "\ufffd")


def _texts(record: Record, column: str, notices: Notices, lists: bool = True) -> list[str]:
    """Return the non-empty texts of a cell, which holds a text, with `lists` also a list of texts, or null."""
    cell = record.fields[column]
    texts = []
    for value in cell if lists and isinstance(cell, list) else [cell]:
        if value is None:
            continue
        if not isinstance(value, str):
            expected = "text or a list of texts" if lists else "text"
            raise InputError(
                f"{record.place}: expected {expected} in column '{column}', found {type(value).__name__} {value!r:.40}"
            )
        if not value.strip():
            continue
        if len(value) > LONG_TEXT:
            notices.add("texts of more than 1 MiB, of which a model reads only the beginning", record.place)
        if "\0" in value:
            notices.add("texts with NUL characters, replaced by U+FFFD", record.place)
        # Tokenizers written in C would truncate the text at the NUL.
        texts.append(value.replace("\0", "\ufffd"))
    return texts


def _beir_records(config: SourceConfig) -> Iterator[Record]:
    from index.beir import BeirDataset, beir_file

    dataset = BeirDataset.open(config.path, config.split)
    qrels_path = beir_file(dataset.folder, f"qrels/{config.split}.tsv")
    relevant = {passage for grades in dataset.qrels.values() for passage, grade in grades.items() if grade > 0}
    # The texts are stored in a file, because the positives of a large corpus may not fit into memory.
    spans: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryFile() as texts:
        for passage in dataset.passages():
            if passage.id in spans:
                raise InputError(
                    f"{config.path}: expected each passage id once in the corpus, found {passage.id} again"
                )
            if passage.id in relevant:
                content = passage.content.encode()
                spans[passage.id] = (texts.tell(), len(content))
                texts.write(content)
        for query, grades in dataset.qrels.items():
            location = f"{qrels_path}: query '{query}'"
            positives = []
            for passage_id in (passage for passage, grade in grades.items() if grade > 0):
                if passage_id not in spans:
                    raise InputError(f"{location}: expected its passage '{passage_id}' in the corpus, found none")
                start, length = spans[passage_id]
                texts.seek(start)
                positives.append(texts.read(length).decode())
            if positives:
                yield Record(location, {config.query: dataset.queries[query], config.positive: positives})


def _huggingface_records(config: SourceConfig) -> Iterator[Record]:
    dataset = load_huggingface(config.path, config.split, streaming=True)
    columns = dataset.column_names
    if columns is not None and {config.query, config.positive} <= set(columns):
        record = Record(config.path, dict.fromkeys(columns))
        # Other columns may hold images or audio, which would be decoded unnecessarily.
        prompts = [name for name in (config.query_prompt_column, config.passage_prompt_column) if name in columns]
        wanted = [
            config.query,
            config.positive,
            *_negative_columns(config, record),
            *_score_columns(config, record),
            *prompts,
        ]
        dataset = dataset.select_columns(list(dict.fromkeys(wanted)))
    number, batches = 0, dataset.with_format("arrow").iter(batch_size=1024)
    while (batch := _next_batch(batches, config.path)) is not None:
        for cells in zip(*batch.values(), strict=True):
            number += 1
            yield Record(f"{config.path}: row {number}", dict(zip(batch, cells, strict=True)))


def _next_batch(batches: Iterator[Any], path: str) -> dict[str, Any] | None:
    """Return the next batch of columns, or None at the end. A streaming dataset reads its files here."""
    from datasets.exceptions import DatasetsError

    try:
        batch = next(batches, None)
        if batch is None:
            return None
        # Offsets of a damaged Arrow file would be followed out of its memory.
        batch.validate(full=True)
        return batch.to_pydict()
    except (*DAMAGED_DATASET, DatasetsError) as error:
        raise _unreadable(path, error) from None


def load_huggingface(path: str, split: str, *, streaming: bool) -> Any:
    """Load one split of a Hugging Face dataset.

    Args:
        path: A folder written by `save_to_disk` or readable by `load_dataset`, or a hub name NAME[:SUBSET][@REVISION].
        split: Name of the split.
        streaming: Whether to read rows on demand. Ignored for folders written by `save_to_disk`.

    Raises:
        InputError: If the dataset cannot be read or has no such split, or the package `datasets` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(f'{path}: reading it needs the package datasets: pip install "dense-retriever[hub]"') from None
    from datasets.exceptions import DatasetsError

    folder = Path(path)
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(path)
            if isinstance(saved, datasets.DatasetDict) and split not in saved:
                raise InputError(f"{path}: expected a split '{split}', found {', '.join(saved)}")
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if folder.exists():
            return datasets.load_dataset(path, split=split, streaming=streaming)
        name, _, revision = path.partition("@")
        name, _, subset = name.partition(":")
        return datasets.load_dataset(name, subset or None, split=split, revision=revision or None, streaming=streaming)
    except InputError:
        raise
    except (*DAMAGED_DATASET, DatasetsError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, LookupError | TypeError | AttributeError) or not reason:
        # Their messages are a name or a key only.
        reason = f"damaged metadata ({type(error).__name__}: {reason})"
    return InputError(f"{path}: cannot be read as a Hugging Face dataset: {reason:.300}")
