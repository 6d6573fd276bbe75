"""Image sets in tables: JSON lines, CSV, TSV or Parquet with image paths and labels or captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.zero_shot.data import CLASS_NAMES, Sample, Task, ZeroShotSet, read_lines, templates_of
from index.files import InputError
from index.image_files import ImageAt
from index.records import Record, read_records

IMAGE_COLUMNS = ("image", "path", "file")
LABEL_COLUMNS = ("label", "labels", "class")
CAPTION_COLUMNS = ("captions", "caption", "text")


def open_table(path: Path) -> ZeroShotSet:
    """Read a table with one image per row: `image`, a path relative to the table, and either `label` or `captions`.

    A label is a class name; a list of names makes the task multilabel. Captions are a text or a list of texts; rows
    with the same image are merged. The file classnames.txt in the same folder gives the classes and their order;
    without it the classes are the sorted labels.

    Raises:
        InputError: the table is empty, or a row lacks a column, has a value of the wrong type or names a missing image.
    """
    rows = list(read_records(path))
    if not rows:
        raise InputError(f"{path}: expected images, found none")
    image = _column(rows[0], IMAGE_COLUMNS)
    column = _column(rows[0], (*LABEL_COLUMNS, *CAPTION_COLUMNS))
    name = path.name.removesuffix(".gz").rpartition(".")[0]
    if column in CAPTION_COLUMNS:
        found = _captioned(path, rows, image, column)
        return ZeroShotSet(name, path, "table", "retrieval", found)
    labels = [_texts(record, column) for record in rows]
    is_multilabel = any(isinstance(record.fields[column], list) for record in rows)
    task: Task = "multilabel" if is_multilabel else "classification"
    names = path.parent / CLASS_NAMES
    classes = read_lines(names) if names.is_file() else tuple(sorted({label for own in labels for label in own}))
    if not classes:
        raise InputError(f"{path}: expected labels in column '{column}', found none")
    number = {label: place for place, label in enumerate(classes)}
    samples = []
    for record, own in zip(rows, labels, strict=True):
        for label in own:
            if label not in number:
                raise InputError(f"{record.place}: expected a label of {names}, found {label!r:.60}")
        samples.append(Sample(_image(path, record, image), labels=tuple(number[label] for label in own)))
    templates, own_templates = templates_of(path.parent)
    return ZeroShotSet(name, path, "table", task, samples, classes, templates, own_templates)


def _captioned(path: Path, rows: list[Record], image: str, column: str) -> list[Sample]:
    captions: dict[str, list[str]] = {}
    places: dict[str, ImageAt] = {}
    for record in rows:
        at = _image(path, record, image)
        places.setdefault(at.name, at)
        captions.setdefault(at.name, []).extend(text for text in _texts(record, column) if text.strip())
    return [Sample(at, captions=tuple(captions[name])) for name, at in places.items()]


def _column(record: Record, names: tuple[str, ...]) -> str:
    for name in names:
        if name in record.fields:
            return name
    raise InputError(
        f"{record.place}: expected a column {' or '.join(map(repr, names))}, found {', '.join(record.fields) or 'none'}"
    )


def _image(path: Path, record: Record, column: str) -> ImageAt:
    value = record.fields.get(column)
    if not isinstance(value, str) or not value:
        raise InputError(f"{record.place}: expected a path in column '{column}', found {value!r:.60}")
    file = path.parent / value
    if not file.is_file():
        raise InputError(f"{record.place}: expected an image, found no file {file}")
    return ImageAt(file, value)


def _texts(record: Record, column: str) -> list[str]:
    if column not in record.fields:
        raise InputError(f"{record.place}: expected a column '{column}', found {', '.join(record.fields)}")
    value: Any = record.fields[column]
    found = value if isinstance(value, list) else [value]
    if isinstance(value, int) and not isinstance(value, bool):
        found = [str(value)]
    if not all(isinstance(text, str) for text in found):
        raise InputError(f"{record.place}: expected text or a list of texts in column '{column}', found {value!r:.60}")
    return found
