"""Opening changed indexes while the service answers from the old ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from index.ann.index import Index
from index.ann.multi_index import MultiIndex
from index.files import InputError
from index.manifest import NAME
from index.passages import file_state


class Reloader:
    """Watches the manifests of indexes, and opens the indexes again when one has been replaced.

    `retriever index add`, `delete`, `tune` and `build` write a complete new folder that replaces the old one. Until the
    new index is open, queries are answered from the old one, whose files stay open. Memory: both while the new one is
    opened. An index that cannot be opened is reported, and the old one is kept. Use as a context manager.

    Args:
        folders: folders of the indexes.
        seconds: seconds between two looks at the manifests, once the block is entered.
        open_indexes: opens the indexes and takes them into use.
        report: called with the outcome, "done" or "failed", and a line for the log.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        seconds: float,
        open_indexes: Callable[[], Index | MultiIndex],
        report: Callable[[str, str], None],
    ) -> None:
        self._manifests = [folder / NAME for folder in folders]
        self._seconds = seconds
        self._open = open_indexes
        self._report = report
        self._state = self._found()
        self._current = True
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reload", daemon=True)

    def __enter__(self) -> Reloader:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _found(self) -> list[tuple[int, int, int] | None]:
        return [file_state(path) for path in self._manifests]

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            self.look()

    def look(self) -> bool:
        """Open the indexes now if one has been replaced. Returns whether those on disk are the ones that are served."""
        with self._lock:
            state = self._found()
            # Between the two renames of a replacement there is no folder.
            if state != self._state and None not in state:
                self._state = state
                self._current = self._opened()
            return self._current

    def _opened(self) -> bool:
        try:
            index = self._open()
        except (InputError, OSError, MemoryError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            self._report("failed", f"the index has changed and cannot be opened; the old one is kept: {line}")
            return False
        self._report("done", f"the index has changed: {index.rows} passages are served now")
        return True
