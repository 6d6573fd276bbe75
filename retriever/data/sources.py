"""Where training examples come from: BEIR folders, files of rows, and Hugging Face datasets, read row by row."""

from __future__ import annotations

import fnmatch
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.files import InputError
from index.records import SUFFIXES, Record, read_records
from retriever.config.sources import SourceConfig

LONG_TEXT = 2**20
"""Characters from which a text is worth a warning: a tower reads only its beginning."""


@dataclass(frozen=True)
class Example:
    """The unit of training: one query, at least one positive, any number of hard negatives; no empty text."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


class Notices:
    """Counts of what was passed over, mended or is odd in what is read, with the first place of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, what: str, place: str) -> None:
        """Count one `what` ("rows skipped: ...") at `place` ("train.jsonl:17")."""
        self._counts[what] += 1
        self._first.setdefault(what, place)

    def count(self, beginning: str) -> int:
        """How many of all kinds that begin so."""
        return sum(count for what, count in self._counts.items() if what.startswith(beginning))

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return dict(self._counts)

    def lines(self) -> list[str]:
        """One line for each kind: "rows skipped for an empty query: 3 (first at train.jsonl:17)"."""
        return [f"{what}: {count} (first at {self._first[what]})" for what, count in self._counts.items()]


def resolve_format(config: SourceConfig) -> str:
    """The format of a source, found by looking at its path where the configuration says auto.

    Raises:
        InputError: nothing is there, or nothing that is known, or not what the configuration says.
    """
    path = Path(config.path)
    if config.format in ("beir", "huggingface"):
        return config.format
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder (for a dataset of the Hugging Face hub, set its format to huggingface)"
        )
    if path.is_dir():
        found = "beir" if _named(path, "corpus.jsonl") or _named(path, "qrels") else "huggingface"
    else:
        found = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if config.format not in ("auto", found):
        raise InputError(f"{path}: expected a file ending in .{config.format}, as its format says, found {found}")
    return found


def source_files(config: SourceConfig) -> list[Path]:
    """The files that a source is read from, sorted; none for a name of the Hugging Face hub."""
    path = Path(config.path)
    if not path.is_dir():
        return [path] if path.exists() else []
    if resolve_format(config) == "huggingface":
        return sorted(file for file in path.rglob("*") if file.is_file())
    names = ("corpus.jsonl", "queries.jsonl", f"qrels/{config.split}.tsv")
    return [file for name in names if (file := _named(path, name))]


def read_examples(config: SourceConfig, notices: Notices) -> Iterator[Example]:
    """Stream a source's rows as examples, in constant memory.

    Rows whose query or positive is empty are skipped, and negatives that are also positives of their row dropped;
    both, and texts that are mended or huge, are counted in `notices`.

    Raises:
        InputError: a file, a column or a qrels entry is missing, or a cell holds something other than text.
    """
    kind = resolve_format(config)
    if kind == "beir":
        records = _beir_records(config)
    elif kind == "huggingface":
        records = _huggingface_records(config)
    else:
        records = read_records(Path(config.path))
    negatives_found, record = False, None
    for record in records:
        columns = _negative_columns(config, record)
        negatives_found |= bool(columns)
        example = _parse(config, record, columns, notices)
        if example is not None:
            yield example
    if record is not None and not negatives_found and config.negatives != SourceConfig.negatives:
        raise InputError(f"{config.path}: expected a column '{config.negatives}' for negatives, found none in any row")


def _named(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _negative_columns(config: SourceConfig, record: Record) -> list[str]:
    if "*" in config.negatives:
        return [column for column in record.fields if fnmatch.fnmatchcase(column, config.negatives)]
    return [config.negatives] if config.negatives in record.fields else []


def _parse(config: SourceConfig, record: Record, negative_columns: list[str], notices: Notices) -> Example | None:
    for column in (config.query, config.positive):
        if column not in record.fields:
            raise InputError(
                f"{record.place}: expected a column '{column}', found {', '.join(record.fields) or 'none'}"
            )
    queries = _texts(record, config.query, notices, lists=False)
    positives = _texts(record, config.positive, notices)
    if not queries or not positives:
        empty = "positive" if queries else "query"
        notices.add(f"rows skipped for an empty {empty}", record.place)
        return None
    negatives = [text for column in negative_columns for text in _texts(record, column, notices)]
    true_negatives = [text for text in negatives if text not in positives]
    if len(true_negatives) < len(negatives):
        notices.add("rows with a negative dropped because it is one of their positives", record.place)
    return Example(queries[0], tuple(dict.fromkeys(positives)), tuple(dict.fromkeys(true_negatives)))


def _texts(record: Record, column: str, notices: Notices, lists: bool = True) -> list[str]:
    """The texts of a cell that are not empty: the cell is a text, a list of texts, or null."""
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
        # Tokenizers written in C end a text at its first NUL.
        texts.append(value.replace("\0", "\ufffd"))
    return texts


def _beir_records(config: SourceConfig) -> Iterator[Record]:
    from index.beir import BeirDataset, beir_file

    dataset = BeirDataset.open(config.path, config.split)
    qrels_path = beir_file(dataset.folder, f"qrels/{config.split}.tsv")
    wanted = {passage for grades in dataset.qrels.values() for passage, grade in grades.items() if grade > 0}
    # Only the places of the texts are held in memory: the positives of a large corpus may not fit.
    spans: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryFile() as texts:
        for passage in dataset.passages():
            if passage.id in spans:
                raise InputError(
                    f"{config.path}: expected each passage id once in the corpus, found {passage.id} again"
                )
            if passage.id in wanted:
                content = passage.content.encode()
                spans[passage.id] = (texts.tell(), len(content))
                texts.write(content)
        for query, grades in dataset.qrels.items():
            place = f"{qrels_path}: query '{query}'"
            positives = []
            for passage_id in (passage for passage, grade in grades.items() if grade > 0):
                if passage_id not in spans:
                    raise InputError(f"{place}: expected its passage '{passage_id}' in the corpus, found none")
                start, length = spans[passage_id]
                texts.seek(start)
                positives.append(texts.read(length).decode())
            if positives:
                yield Record(place, {config.query: dataset.queries[query], config.positive: positives})


def _huggingface_records(config: SourceConfig) -> Iterator[Record]:
    dataset = load_huggingface(config.path, config.split, streaming=True)
    columns = dataset.column_names
    if columns is not None and {config.query, config.positive} <= set(columns):
        record = Record(config.path, dict.fromkeys(columns))
        # Other columns may hold images or sounds, which would be decoded for nothing.
        dataset = dataset.select_columns([config.query, config.positive, *_negative_columns(config, record)])
    number, batches = 0, dataset.iter(batch_size=1024)
    while (batch := _next_batch(batches, config.path)) is not None:
        for cells in zip(*batch.values(), strict=True):
            number += 1
            yield Record(f"{config.path}: row {number}", dict(zip(batch, cells, strict=True)))


def _next_batch(batches: Iterator[dict[str, Any]], path: str) -> dict[str, Any] | None:
    """The columns of some rows, none at the end; of a stream it is now that files are looked into."""
    from datasets.exceptions import DatasetsError

    try:
        return next(batches, None)
    except (OSError, ValueError, DatasetsError) as error:
        raise _unreadable(path, error) from None


def load_huggingface(path: str, split: str, *, streaming: bool) -> Any:
    """One split of a dataset: a folder that `save_to_disk` wrote or `load_dataset` reads, or a hub name.

    Raises:
        InputError: it cannot be read, has no such split, or the package datasets is missing.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(f'{path}: reading it needs the package datasets: pip install "dense-retriever[hub]"') from None
    folder = Path(path)
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(path)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if folder.exists():
            return datasets.load_dataset(path, split=split, streaming=streaming)
        name, _, revision = path.partition("@")
        name, _, subset = name.partition(":")
        return datasets.load_dataset(name, subset or None, split=split, revision=revision or None, streaming=streaming)
    except KeyError:
        raise InputError(f"{path}: expected a split '{split}', found {', '.join(saved)}") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"{path}: cannot be read as a Hugging Face dataset: {reason}")
