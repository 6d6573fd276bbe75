"""Reading fields from the rows of a corpus."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from index.files import InputError
from index.records import read_records

FieldValue = str | int | float | bool | None | list[str]
"""A value of a field. A list of texts matches a filter if one of its texts does."""

KEY = "fields"
"""Key of the fields in a line of passages of a store or an index."""
# Rows of a corpus in which a field must occur.
SAMPLE = 1000
MAX_INTEGER = 2**63
RESERVED = ("_id", "id", "title", "text")
_MISSING = object()


def read_fields(row: Mapping[str, Any], names: Sequence[str], place: str) -> dict[str, FieldValue]:
    """The fields `names` of a row; a name with dots ("metadata.year") reads nested objects. A missing field is None.

    Raises:
        InputError: a value is neither text, a number, true or false, null nor a list of texts; the message begins with
            `place`.
    """
    return {name: _checked(_lookup(row, name), name, place) for name in names}


def check_field_names(corpus: Path, names: Sequence[str]) -> None:
    """Check that each name is a field of one of the first SAMPLE rows, so that a mistyped one is not null everywhere.

    Raises:
        InputError: a name is unknown, given twice, or one that passages always have.
    """
    for name in names:
        if name in RESERVED or not name or names.count(name) > 1:
            expected = f"expected different names other than {', '.join(RESERVED)}"
            raise InputError(f"{corpus}: fields: {expected}, found {name!r:.60}")
    missing, found = dict.fromkeys(names), dict.fromkeys(["none"])
    if missing:
        for record in islice(read_records(corpus), SAMPLE):
            found |= dict.fromkeys(record.fields)
            missing = {name: None for name in missing if _lookup(record.fields, name) is _MISSING}
            if not missing:
                return
        columns = ", ".join([name for name in found if name not in RESERVED][1:]) or "none"
        raise InputError(
            f"{corpus}: expected the field {next(iter(missing))!r:.60} in one of the first {SAMPLE} rows, "
            f"found {columns:.200}"
        )


def _lookup(row: Mapping[str, Any], name: str) -> object:
    if name in row or "." not in name:
        return row.get(name, _MISSING)
    first, _, rest = name.partition(".")
    nested = row.get(first)
    return _lookup(nested, rest) if isinstance(nested, Mapping) else _MISSING


def _checked(value: object, name: str, place: str) -> FieldValue:
    if value is _MISSING or value is None or isinstance(value, str | bool):
        return None if value is _MISSING else value  # type: ignore[return-value]
    if isinstance(value, int) and -MAX_INTEGER <= value < MAX_INTEGER:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    expected = "expected text, a number of 64 bits, true, false, null or a list of texts"
    raise InputError(f"{place}: field {name!r:.60}: {expected}, found {value!r:.60}")
