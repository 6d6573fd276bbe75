"""Row numbers in place of ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload


class RowNumberIds(Sequence[str]):
    """The ids "0" to "N-1", created on access: a search that needs only rows does not load the real ids."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [str(number) for number in range(*row.indices(self._rows))]
        return str(range(self._rows)[row])
