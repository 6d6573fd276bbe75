"""Filters of a search by fields of passages, in the form that Chroma, Pinecone and MongoDB use."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from index.fields.columns import Columns, texts_parent_rows
from index.fields.values import MAX_INTEGER
from index.files import InputError, parse_json

OPERATORS = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists")
JOINED = ("$and", "$or", "$not")
# Conditions and values of one filter.
MAX_CONDITIONS = 100
MAX_VALUES = 10_000
_CONDITION = re.compile(r"([^\s<>=!]+)\s*(>=|<=|!=|=|>|<)\s*(.*)", re.DOTALL)
_SIGNS = {"=": "$eq", "!=": "$ne", ">": "$gt", ">=": "$gte", "<": "$lt", "<=": "$lte"}


class FilterError(InputError):
    """An invalid filter, or one that does not fit the fields of the passages or the index."""


class Filter:
    """A condition on the fields of passages.

    `{"lang": "en"}` is equality, `{"year": {"$gte": 2000, "$lt": 2010}}` a range, `{"lang": {"$in": ["en", "de"]}}` one
    of several values, `{"url": {"$exists": False}}` a missing value. Several fields must all match. `{"$or": [...]}`,
    `{"$and": [...]}` and `{"$not": {...}}` combine filters. A passage without a value matches only "$ne", "$nin",
    "$not" and `{"$exists": False}`. A field of several texts matches "$eq" and "$in" if one of its texts does.

    Args:
        condition: the condition.

    Raises:
        FilterError: the condition does not have this form.
    """

    def __init__(self, condition: Mapping[str, Any]) -> None:
        self._left = MAX_CONDITIONS
        self._check(condition)
        self.condition = dict(condition)
        try:
            # Equal filters have equal keys.
            self.key = json.dumps(self.condition, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise FilterError(f"filter: expected values of JSON, found {condition!r:.80}") from None

    def __repr__(self) -> str:
        return f"Filter({self.condition!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filter) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def mask(self, columns: Columns, rows: int) -> np.ndarray:
        """Which rows match, bool [N].

        Raises:
            FilterError: the index has no such field, or its values have another type.
        """
        return _mask(self.condition, columns, rows)

    def _check(self, condition: object) -> None:
        if not isinstance(condition, Mapping) or not condition:
            raise FilterError(f"filter: expected an object with a field or more, found {condition!r:.80}")
        for name, value in condition.items():
            self._left -= 1
            if self._left < 0:
                raise FilterError(f"filter: expected at most {MAX_CONDITIONS} conditions, found more")
            if name == "$not":
                self._check(value)
            elif name in ("$and", "$or"):
                if not isinstance(value, list) or not value:
                    raise FilterError(f"filter: {name}: expected a list of filters, found {value!r:.80}")
                for each in value:
                    self._check(each)
            elif not isinstance(name, str) or name.startswith("$"):
                raise FilterError(f"filter: expected a field or {', '.join(JOINED)}, found {name!r:.60}")
            else:
                _check_operators(name, value)


FilterInput = Filter | Mapping[str, Any] | str


def as_filter(value: FilterInput | None) -> Filter | None:
    """The filter of a mapping, or of a text: JSON, or conditions such as `year>=2000 lang=en`, which must all match.

    In a condition, quotes enclose values with blanks, and the field's type decides how the value is read.

    Raises:
        FilterError: the filter does not have this form.
    """
    if value is None or isinstance(value, Filter):
        return value
    if isinstance(value, Mapping):
        return Filter(value)
    if not isinstance(value, str):
        raise FilterError(f"filter: expected an object or a text, found {type(value).__name__}")
    if value.lstrip().startswith("{"):
        try:
            return Filter(parse_json(value, "filter"))
        except FilterError:
            raise
        except InputError as error:
            raise FilterError(str(error)) from None
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise FilterError(f"filter: expected conditions such as lang=en, found: {error}") from None
    conditions = []
    for word in words:
        match = _CONDITION.fullmatch(word)
        if match is None:
            raise FilterError(f"filter: expected a condition such as year>=2000 or lang=en, found {word!r:.60}")
        conditions.append({match[1]: {_SIGNS[match[2]]: _Text(match[3])}})
    return Filter({"$and": conditions} if len(conditions) != 1 else conditions[0]) if conditions else None


class _Text(str):
    """The value of a condition in a text, which may stand for a number or for true or false."""


def _check_operators(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        _check_value(name, value)
        return
    for operator, operand in value.items():
        if operator not in OPERATORS:
            raise FilterError(f"filter: {name}: expected {', '.join(OPERATORS)}, found {operator!r:.60}")
        if operator in ("$in", "$nin"):
            if not isinstance(operand, list) or len(operand) > MAX_VALUES:
                found = f"found {operand!r:.80}"
                raise FilterError(f"filter: {name}: {operator}: expected a list of up to {MAX_VALUES} values, {found}")
            for each in operand:
                _check_value(name, each)
        elif operator == "$exists" and not isinstance(operand, bool):
            raise FilterError(f"filter: {name}: $exists: expected true or false, found {operand!r:.60}")
        else:
            _check_value(name, operand)
    if not value:
        raise FilterError(f"filter: {name}: expected {', '.join(OPERATORS)}, found none")


def _check_value(name: str, value: object) -> None:
    if not isinstance(value, str | int | float | bool):
        raise FilterError(f"filter: {name}: expected text, a number, true or false, found {value!r:.60}")


def _mask(condition: Mapping[str, Any], columns: Columns, rows: int) -> np.ndarray:
    matches = np.ones(rows, bool)
    for name, value in condition.items():
        if name == "$not":
            matches &= ~_mask(value, columns, rows)
        elif name == "$and":
            for each in value:
                matches &= _mask(each, columns, rows)
        elif name == "$or":
            matches &= np.logical_or.reduce([_mask(each, columns, rows) for each in value])
        else:
            operators = value if isinstance(value, Mapping) else {"$eq": value}
            for operator, operand in operators.items():
                matches &= _compare(name, operator, operand, columns, rows)
    return matches


def _compare(name: str, operator: str, operand: Any, columns: Columns, rows: int) -> np.ndarray:
    import pyarrow
    import pyarrow.compute as compute

    try:
        column = columns.column(name)
    except InputError as error:
        raise FilterError(f"filter: field: {error}") from None
    kind = columns.kinds[name]
    if operator == "$exists":
        return _as_bool(compute.is_valid(column)) == operand
    if operator in ("$ne", "$nin"):
        return ~_compare(name, {"$ne": "$eq", "$nin": "$in"}[operator], operand, columns, rows)
    wanted = [_value(name, kind, each) for each in (operand if operator == "$in" else [operand])]
    if kind == "integer" and not all(isinstance(each, int) for each in wanted):
        column, wanted = column.cast(pyarrow.float64(), safe=False), [float(each) for each in wanted]
    if operator in ("$eq", "$in"):
        values = pyarrow.array(wanted, pyarrow.string() if kind == "texts" else column.type)
        if kind != "texts":
            return _as_bool(compute.is_in(column, value_set=values, skip_nulls=True))
        parents, texts = texts_parent_rows(column)
        matches = np.zeros(rows, bool)
        matches[parents[_as_bool(compute.is_in(texts, value_set=values, skip_nulls=True))]] = True
        return matches
    if kind not in ("text", "integer", "number"):
        raise FilterError(f"filter: {name}: expected $eq, $ne, $in, $nin or $exists for {kind}, found {operator}")
    order = {"$gt": "greater", "$gte": "greater_equal", "$lt": "less", "$lte": "less_equal"}[operator]
    return _as_bool(compute.call_function(order, [column, pyarrow.scalar(wanted[0], column.type)]))


def _value(name: str, kind: str, value: Any) -> Any:
    """The value in the type of a column.

    Raises:
        FilterError: the value has another type.
    """
    found = f"found {value!r:.60}"
    if kind in ("text", "texts"):
        if isinstance(value, str):
            return str(value)
        raise FilterError(f"filter: {name}: expected text, {found}")
    if kind == "boolean":
        if isinstance(value, bool) or (isinstance(value, _Text) and value.lower() in ("true", "false")):
            return value if isinstance(value, bool) else value.lower() == "true"
        raise FilterError(f"filter: {name}: expected true or false, {found}")
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(value, _Text | int | float) and not isinstance(value, bool):
            number = float(value)
            # Whole numbers of 64 bits stay exact.
            whole = kind == "integer" and number.is_integer() and abs(number) < MAX_INTEGER
            return int(value) if whole and str(value).lstrip("-").isdecimal() else number
    raise FilterError(f"filter: {name}: expected a number, {found}")


def _as_bool(values: Any) -> np.ndarray:
    """A pyarrow array of booleans as numpy bool; null is False."""
    return np.asarray(values.fill_null(False), bool)
