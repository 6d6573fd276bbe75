"""Row numbers in the place of ids, where nobody reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload


class RowNames(Sequence[str]):
    """The ids "0" to N - 1 as text, made when asked for: exact search by rows alone needs no list of real ids."""

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
