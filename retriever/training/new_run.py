"""What the start of a run makes on disk, removed where it fails before its first step."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from index.progress import Reporter
from retriever.config.yaml_file import CONFIG_FILE
from retriever.training.run_log import METRICS_FILE

# Bytes from which what was read of the data is kept for the next start, which would have to read it again.
WORTH_KEEPING = 2**20


class NewRun:
    """The folders that do not exist yet when a run is started, and what is written into them."""

    def __init__(self, out: Path, cache: Path, reporter: Reporter):
        self.out, self.cache, self.reporter = out, cache, reporter
        self.begun = False
        """Whether this run has written its configuration: what stands there is its own."""
        self._missing = {path for path in (out, *out.parents, cache, *cache.parents) if not path.exists()}

    @contextlib.contextmanager
    def removed_on_failure(self, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Remove what was made since where the body raises, `unless` there is something to go on with."""
        try:
            yield
        except BaseException:
            if not unless():
                self._remove()
            raise

    def _remove(self) -> None:
        if not self.begun and (self.out / CONFIG_FILE).exists():
            # Another start was quicker.
            return
        if self.begun:
            (self.out / CONFIG_FILE).unlink(missing_ok=True)
            # Without a step it has no rows.
            (self.out / METRICS_FILE).unlink(missing_ok=True)
            shutil.rmtree(self.out / "tensorboard", ignore_errors=True)
        if self.cache in self._missing and self.cache.is_dir():
            if sum(path.stat().st_size for path in self.cache.rglob("*") if path.is_file()) < WORTH_KEEPING:
                shutil.rmtree(self.cache, ignore_errors=True)
            else:
                self.reporter.line(f"{self.cache}: kept for the next start, which need not read the data again")
        for folder in sorted(self._missing, key=lambda path: len(path.parts), reverse=True):
            # Only empty ones.
            with contextlib.suppress(OSError):
                folder.rmdir()
