"""A process group inside a module: copies of the module share it, and a pickled module does without it."""

from __future__ import annotations

from typing import Any

from torch import distributed


class HeldGroup:
    """Holds a process group, or none, which torch can neither copy nor pickle."""

    def __init__(self, group: Any, missing: str = "") -> None:
        self._group = group
        self._missing = missing

    def get(self) -> Any:
        """The group, or None for the loss of one process.

        Raises:
            ValueError: it stayed behind when the module was pickled.
        """
        if self._missing:
            raise ValueError(self._missing)
        return self._group

    def __copy__(self) -> HeldGroup:
        return self

    def __deepcopy__(self, memo: Any) -> HeldGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._group is None or self._missing:
            return HeldGroup, (None, self._missing)
        return _restored, (distributed.get_world_size(self._group), self._group is distributed.group.WORLD)


def _restored(size: int, world: bool) -> HeldGroup:
    """The default group where it was that one and is there again with as many processes; otherwise what is missing."""
    if world and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() == size:
        return HeldGroup(distributed.group.WORLD)
    return HeldGroup(
        None,
        f"group must be set again: this loss was pickled with a process group of {size} processes; set its attribute "
        "`group`, to None for the loss of one process",
    )
