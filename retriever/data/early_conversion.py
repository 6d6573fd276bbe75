"""Converting the sources of a run in a separate process, while the command imports its libraries.

Importing torch and sentence-transformers takes several seconds, and so does reading a few hundred thousand rows;
neither needs the other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from index.files import InputError, atomic_path, write_json
from retriever.config.sources import SourceConfig
from retriever.data.sources import resolve_format, source_files
from retriever.errors import ConfigError

# Larger sources would fill the folder for temporary files, and for them some seconds matter less.
MAX_BYTES = 2**28
_DONE = "done.json"


class EarlyConversion:
    """A forked process that calls `convert` for each source, and the folder that it writes to."""

    def __init__(self, sources: Sequence[SourceConfig], convert: Callable[[SourceConfig, Path], Any]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="retriever-"))
        context: Any = multiprocessing.get_context("fork")
        self._process = context.Process(target=_convert, args=(sources, convert, self._folder), daemon=True)
        self._process.start()

    def take(self, key: str, cache: Path, progress: Callable[[int], None] | None) -> bool:
        """Move the files whose names begin with `key` into `cache`; false if the conversion has not made them.

        Waits until the process has ended, and meanwhile calls `progress` with 0.
        """
        while self._process.is_alive():
            self._process.join(0.1)
            if progress is not None:
                progress(0)
        # Only then all files are complete.
        if not (self._folder / _DONE).exists():
            return False
        # The JSON file last, as the conversion writes it.
        found = sorted(self._folder.glob(f"{key}.*"), key=lambda path: path.suffix == ".json")
        for path in found:
            with atomic_path(cache / path.name) as temporary:
                shutil.copyfile(path, temporary)
        return bool(found)

    def close(self) -> None:
        """End the process and remove the files that were not used."""
        self._process.terminate()
        self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


_running: list[EarlyConversion] = []


@contextlib.contextmanager
def converting(sources: Sequence[SourceConfig], convert: Callable[[SourceConfig, Path], Any]) -> Iterator[None]:
    """Context in which a process converts small sources into a temporary folder, from which `taken` moves them.

    Does nothing where a process cannot be forked safely, or for sources that are large or cannot be read; those are
    converted, or refused, when they are opened.
    """
    if not sys.platform.startswith("linux") or "torch" in sys.modules or not _are_small(sources):
        yield
        return
    early = EarlyConversion(sources, convert)
    _running.append(early)
    try:
        yield
    finally:
        _running.remove(early)
        early.close()


def taken(key: str, cache: Path, progress: Callable[[int], None] | None = None) -> bool:
    """Whether a running conversion has put its files of this key into `cache`."""
    return any(early.take(key, cache, progress) for early in _running)


def _are_small(sources: Sequence[SourceConfig]) -> bool:
    try:
        if not sources or any(resolve_format(source) == "huggingface" for source in sources):
            return False
        return sum(path.stat().st_size for source in sources for path in source_files(source)) <= MAX_BYTES
    except (InputError, ConfigError, OSError):
        return False


def _convert(sources: Sequence[SourceConfig], convert: Callable[[SourceConfig, Path], Any], folder: Path) -> None:
    # Errors are reported by the parent, which opens the sources again.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            for source in sources:
                convert(source, folder)
        except (InputError, ConfigError, OSError):
            return
        write_json(folder / _DONE, {})
