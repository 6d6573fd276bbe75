"""Image sets in tables: JSON lines, CSV, TSV, Parquet and Hugging Face datasets, with labels or captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.zero_shot.data import Sample, Task, ZeroShotSet, templates_of
from eval.zero_shot.layouts import names_of
from index.files import InputError
from index.image_files.classes import CLASS_NAMES, read_class_names
from index.image_files.folders import CAPTION_COLUMNS, IMAGE_COLUMNS, ImageAt, StoredImage, choose_column
from index.image_files.tables import ImageCell, ImageTable
from index.records import Record, read_records

LABEL_COLUMNS = ("label", "labels", "class")


@dataclass(frozen=True)
class Columns:
    """Columns of a table. Empty: chosen by their usual names; a table with labels and captions needs a choice."""

    image: str = ""
    label: str = ""
    caption: str = ""


ANY_COLUMNS = Columns()


class _Rows:
    """The rows of a text file, or of an ImageTable."""

    def __init__(self, path: Path, table: ImageTable | None) -> None:
        self._path, self._table = path, table
        self.place, self.class_names = str(path), dict[str, list[str]]()
        if table is not None:
            self.columns, self.class_names = table.columns, table.class_names
            return
        first = next(read_records(path), None)
        if first is None:
            raise InputError(f"{path}: expected images, found none")
        self.place, self.columns = first.place, list(first.fields)

    def records(self, image: str, column: str) -> list[Record]:
        """All rows, without images that are in the table."""
        if self._table is None:
            return list(read_records(self._path))
        columns = [column] if self._table.has_images(image) else [image, column]
        return list(self._table.records(columns))

    def image(self, row: int, record: Record, column: str) -> StoredImage:
        """The image of a row."""
        if self._table is not None and self._table.has_images(column):
            return ImageCell(self._table, column, row)
        value = record.fields.get(column)
        if not isinstance(value, str) or not value:
            raise InputError(f"{record.place}: expected a path in column '{column}', found {value!r:.60}")
        file = (self._path if self._path.is_dir() else self._path.parent) / value
        if not file.is_file():
            raise InputError(f"{record.place}: expected an image, found no file {file}")
        return ImageAt(file, value)


def open_table(path: Path, split: str, columns: Columns) -> ZeroShotSet | None:
    """Read a table with one image per row, and either labels or captions.

    The image is a path relative to the table, or in Parquet files and Hugging Face datasets also the image itself. A
    label is the name of a class, or its 0-based line number in classnames.txt; a list of labels makes the task
    multilabel. Captions are a text or a list of texts; rows with the same image are merged. The file classnames.txt in
    the same folder gives the classes and their order, or the names in the features of a Hugging Face dataset; without
    them the classes are the sorted labels.

    Args:
        path: A file, or a folder of Parquet files or of a saved dataset.
        split: Split of a folder.
        columns: Columns to read.

    Returns:
        The set, or None if the path is a folder of something else.

    Raises:
        InputError: the table is empty, has labels and captions and none is chosen, or a row lacks a column, has an
            empty label or a value of the wrong type, or names a missing image.
    """
    table = ImageTable.open(path, split)
    if table is None and path.is_dir():
        return None
    rows = _Rows(path, table)
    image = columns.image or choose_column(rows.place, rows.columns, IMAGE_COLUMNS)
    column, is_label = _task_column(rows, columns)
    for chosen in (image, column):
        choose_column(rows.place, rows.columns, [chosen])
    records = rows.records(image, column)
    if not records:
        raise InputError(f"{path}: expected images, found none")
    images = [rows.image(row, record, image) for row, record in enumerate(records)]
    name = path.resolve().name if path.is_dir() else path.name.removesuffix(".gz").rpartition(".")[0]
    if not is_label:
        return ZeroShotSet(name, path, "table", "retrieval", _captioned(records, images, column))
    folder = path if path.is_dir() else path.parent
    is_multilabel = any(isinstance(record.fields.get(column), list) for record in records)
    task: Task = "multilabel" if is_multilabel else "classification"
    file = folder / CLASS_NAMES
    names: list[tuple[str, ...]] = [(name,) for name in rows.class_names.get(column, ())]
    if file.is_file():
        names = read_class_names(file)
    labels, classes = _numbered(records, column, names, str(file) if file.is_file() else str(path))
    if not classes:
        raise InputError(f"{path}: expected labels in column '{column}', found none")
    samples = [Sample(each, labels=own) for each, own in zip(images, labels, strict=True)]
    templates, own_templates = templates_of(folder)
    return ZeroShotSet(
        name, path, "table", task, samples, **names_of(classes), templates=templates, own_templates=own_templates
    )


def _task_column(rows: _Rows, columns: Columns) -> tuple[str, bool]:
    """The column with labels or captions, and whether it has labels."""
    if columns.label and columns.caption:
        raise InputError(
            f"{rows.place}: expected the column of labels or that of captions, found both: {columns.label!r} and "
            f"{columns.caption!r}"
        )
    if columns.label or columns.caption:
        return columns.label or columns.caption, bool(columns.label)
    label = next((name for name in LABEL_COLUMNS if name in rows.columns), None)
    caption = next((name for name in CAPTION_COLUMNS if name in rows.columns), None)
    if label and caption:
        raise InputError(
            f"{rows.place}: expected labels or captions, found the columns '{label}' and '{caption}': choose one with "
            f"label or caption"
        )
    return choose_column(rows.place, rows.columns, (*LABEL_COLUMNS, *CAPTION_COLUMNS)), label is not None


def _numbered(
    records: Sequence[Record], column: str, names: list[tuple[str, ...]], source: str
) -> tuple[list[tuple[int, ...]], list[tuple[str, ...]]]:
    """The class numbers of each row, and the names of each class.

    Args:
        records: The rows.
        column: The column of labels.
        names: The names of each class; empty: the classes are the labels.
        source: Where the names are from, for messages.
    """
    labels = [_labels(record, column) for record in records]
    known = {name: number for number, own in enumerate(names) for name in own}
    are_numbers = all(label.isdecimal() for own in labels for label in own)
    if names and are_numbers and not all(label in known for own in labels for label in own):
        # As in CLIP_benchmark, numbers are line numbers.
        known = {str(number): number for number in range(len(names))}
    elif not names:
        # Numbers in numerical order: 2 before 10.
        ordered = sorted({label for own in labels for label in own}, key=int if are_numbers else None)
        names, known = [(label,) for label in ordered], {label: number for number, label in enumerate(ordered)}
    numbers = []
    for record, own in zip(records, labels, strict=True):
        for label in own:
            if label not in known:
                wanted = f"a number from 0 to {len(names) - 1}" if are_numbers else "a label"
                raise InputError(f"{record.place}: expected {wanted} of {source}, found {label!r:.60}")
        numbers.append(tuple(dict.fromkeys(known[label] for label in own)))
    return numbers, names


def _labels(record: Record, column: str) -> list[str]:
    value: Any = record.fields.get(column)
    labels = []
    for each in value if isinstance(value, list) else [value]:
        text = str(each) if isinstance(each, int) and not isinstance(each, bool) else each
        if not isinstance(text, str):
            raise InputError(
                f"{record.place}: expected text or a list of texts in column '{column}', found {value!r:.60}"
            )
        if not text.strip():
            raise InputError(f"{record.place}: expected a label in column '{column}', found an empty text")
        labels.append(text.strip())
    return labels


def _captioned(records: Sequence[Record], images: Sequence[StoredImage], column: str) -> list[Sample]:
    captions: dict[str, list[str]] = {}
    first: dict[str, StoredImage] = {}
    for record, image in zip(records, images, strict=True):
        first.setdefault(image.name, image)
        captions.setdefault(image.name, []).extend(_captions(record, column))
    return [Sample(image, captions=tuple(captions[name])) for name, image in first.items()]


def _captions(record: Record, column: str) -> list[str]:
    if column not in record.fields:
        raise InputError(f"{record.place}: expected a column '{column}', found {', '.join(record.fields)}")
    value: Any = record.fields[column]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{record.place}: expected text or a list of texts in column '{column}', found {value!r:.60}")
    return [text.strip() for text in texts if text.strip()]
