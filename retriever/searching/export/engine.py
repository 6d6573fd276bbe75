"""The interface of the engines that a store can be written to."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from index.files import InputError
from index.passages import Passage

NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")


class Engine(ABC):
    """A collection of vectors with ids and passages in another engine. Rows keep their numbers.

    Args:
        where: folder or address.
        name: name of the collection or table.
        dim: D, the length of a vector.
    """

    extra = ""
    """The extra of this package with the engine's client."""

    def __init__(self, where: str, name: str, dim: int) -> None:
        if not NAME.fullmatch(name):
            raise InputError(f"name: expected small letters, digits and _, found {name!r:.60}")
        self.where, self.name, self.dim = where, name, dim
        try:
            with self.one_line():
                self._open()
        except ImportError as error:
            raise InputError(
                f'{type(self).__name__.lower()} needs {error.name}: pip install "dense-retriever[{self.extra}]"'
            ) from None

    @contextmanager
    def one_line(self) -> Iterator[None]:
        """Raise the client's errors in the body as an InputError of one line."""
        try:
            yield
        except (InputError, ImportError):
            raise
        except Exception as error:
            if not isinstance(error, self.errors()):
                raise
            problem = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{type(self).__name__.lower()}: {self.name}: {problem:.300}") from None

    @abstractmethod
    def errors(self) -> tuple[type[Exception], ...]:
        """What the client raises where something is wrong there: no connection, another dimension, a full disk."""

    @abstractmethod
    def _open(self) -> None:
        """Connect, and create the collection if it is missing."""

    @abstractmethod
    def rows(self) -> int:
        """Number of rows there."""

    @abstractmethod
    def passages(self, rows: Sequence[int]) -> list[Passage]:
        """The passages of some rows, in order; rows that do not exist are left out."""

    @abstractmethod
    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Write the rows from `first` on, also over rows of an interrupted run; vectors [n, D] float32."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        """The k nearest rows of each query [Q, D] by inner product, exactly, best first."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect."""

    def finish(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Called when all rows are written, before they are verified."""

    def stored(self, passage: Passage) -> Passage:
        """A passage as this engine keeps it."""
        return passage


def payload_of(passage: Passage) -> dict[str, Any]:
    """What engines of documents keep with a vector."""
    return {"id": passage.id, "title": passage.title, "text": passage.text, **passage.fields}


def passage_of(payload: dict[str, Any]) -> Passage:
    """The inverse of `payload_of`."""
    fields = dict(payload)
    id_, title, text = (str(fields.pop(name)) for name in ("id", "title", "text"))
    return Passage(id_, title, text, fields)
