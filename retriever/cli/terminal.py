"""Progress bars with rate and time left, and messages, on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from index.progress import Reporter

# Seconds between the lines that stand for a bar where there is no terminal.
LINE_EVERY = 60.0


class Terminal(Reporter):
    """Draws progress bars if standard error is a terminal, otherwise prints a line a minute.

    Use as a context manager.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bars: Any = None
        self._starting: Any = None

    def __enter__(self) -> Terminal:
        if sys.stderr.isatty():
            self._bars = _live_progress()
            # Importing PyTorch and transformers takes seconds, before the command shows anything itself.
            self._starting = self._bars.add_task("loading libraries", total=None, note="")
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._started()
            self._bars.stop()
            self._bars = None

    def _started(self) -> None:
        """Remove the bar of the start, once there is something else to show."""
        if self._starting is not None:
            self._bars.remove_task(self._starting)
            self._starting = None

    @property
    def is_live(self) -> bool:
        """Whether bars are drawn."""
        return self._bars is not None

    def line(self, text: str) -> None:
        """Print one line, above the bars."""
        if self._bars is not None:
            self._started()
            self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, task: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
        """Draw one progress bar; see `Reporter.bar`.

        A note replaces the rate. Without bars, tasks with notes print nothing here: they log their own lines.
        """
        if self._bars is None:
            yield self._lines(task, total, unit, done)
            return
        self._started()
        bar = self._bars.add_task(task, total=total, completed=done, note="")
        noted = False

        def advance(count: int, note: str | None = None) -> None:
            nonlocal noted
            self._bars.advance(bar, count)
            noted = noted or note is not None
            speed = next(t for t in self._bars.tasks if t.id == bar).speed
            if not noted and speed:
                note = f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.2f} {unit}/s"
            if note is not None:
                self._bars.update(bar, note=note)

        try:
            yield advance
        finally:
            self._bars.remove_task(bar)

    def _lines(self, what: str, total: int | None, unit: str, done: int) -> Callable[..., None]:
        """Print how much is done, the rate and the time left, once a minute."""
        started = printed = time.monotonic()
        count, noted = done, False

        def advance(more: int, note: str | None = None) -> None:
            nonlocal printed, count, noted
            count, noted = count + more, noted or note is not None
            now = time.monotonic()
            if noted or now < printed + LINE_EVERY or count == done:
                return
            printed, rate = now, (count - done) / (now - started)
            of, left = "", ""
            if total is not None:
                seconds = max(0, round((total - count) / rate))
                of, left = f"/{total:,}", f"  left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            self.line(f"{what}  {count:,}{of} {unit}  {rate:,.1f} {unit}/s{left}")

        return advance


def _live_progress() -> Any:
    from rich import progress
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    class NoteColumn(progress.ProgressColumn):
        """The only column that may shrink, so that a narrow terminal cuts the note and keeps the rest."""

        def render(self, task: progress.Task) -> Text:
            return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")

    one_line = Column(no_wrap=True)
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False, table_column=one_line),
        progress.BarColumn(bar_width=20, table_column=one_line),
        progress.MofNCompleteColumn(table_column=one_line),
        progress.TimeElapsedColumn(table_column=one_line),
        progress.TimeRemainingColumn(table_column=one_line),
        NoteColumn(),
        console=Console(stderr=True),
        # rich would take standard output for its own and print the commands' answers on standard error.
        redirect_stdout=False,
        refresh_per_second=4,
        # One step of a large batch may take many minutes, and rich forgets after thirty seconds.
        speed_estimate_period=3600,
    )
