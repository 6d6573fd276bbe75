"""Where a training step's time goes: its phases by the device's clock, its operators by torch's profiler."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from index.files import atomic_path

# Steps before the profile: kernels are built and memory is found in them.
WARM_UP, STEPS = 3, 3
TRACE = "profile.json.gz"
_OPERATORS = 15

Batch = TypeVar("Batch")

_clock: ContextVar[PhaseClock | None] = ContextVar("phase_clock", default=None)


@dataclass
class PhaseClock:
    """Readings at the beginning and the end of phases. On a GPU they are events on its stream: nothing waits."""

    device: torch.device
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def now(self) -> Any:
        """A reading."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """The time of each phase, in the order of their first beginning; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        sums: dict[str, float] = {}
        for name, start, end in self.spans:
            taken = start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)
            sums[name] = sums.get(name, 0.0) + taken
        return sums


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Within, a step is in this phase: in a profile's table and in its trace. Phases follow one another."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    with torch.profiler.record_function(name):
        start = clock.now()
        yield
        clock.spans.append((name, start, clock.now()))


class StepProfile:
    """Watches the steps of a run go by and profiles `STEPS` of them, after `WARM_UP`."""

    def __init__(self, device: torch.device, folder: Path):
        """`folder`: of the run, where the trace goes."""
        self._clock = PhaseClock(device)
        self._trace = folder / TRACE
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._start: Any = None

    def watch(self, batches: Iterable[Batch], tell: Callable[[str], None]) -> Iterator[Batch]:
        """The batches, unchanged; what is done with each, until the next is asked for, counts as a step.

        Args:
            tell: takes the lines of the profile when it is complete.
        """
        remaining = iter(batches)
        for step in itertools.count():
            if step == WARM_UP:
                self._begin()
            with phase("wait for a batch"):
                batch = next(remaining, None)
            if batch is None:
                return
            yield batch
            if step + 1 == WARM_UP + STEPS:
                for line in self._end():
                    tell(line)

    def _begin(self) -> None:
        _clock.set(self._clock)
        self._profiler.start()
        self._start = self._clock.now()

    def _end(self) -> list[str]:
        whole = PhaseClock(self._clock.device, [("step", self._start, self._clock.now())]).milliseconds()["step"]
        self._profiler.stop()
        _clock.set(None)
        self._write_trace()
        return [
            *_phase_lines(self._clock.milliseconds(), whole),
            *self._operator_lines(),
            f"trace: {self._trace} (for ui.perfetto.dev or chrome://tracing)",
        ]

    def _write_trace(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(plain))
            with atomic_path(self._trace) as path, plain.open("rb") as source, gzip.open(path, "wb") as target:
                shutil.copyfileobj(source, target)

    def _operator_lines(self) -> list[str]:
        cuda = self._clock.device.type == "cuda"
        kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        # What ran on the device itself, kernels on a GPU; phases are no operators.
        rows = [row for row in self._profiler.key_averages() if row.device_type == kind and not row.is_user_annotation]
        spent = {row.key: (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1000 for row in rows}
        calls = {row.key: round(row.count / STEPS) for row in rows}
        total = sum(spent.values())
        lines = [f"{'kernel' if cuda else 'operator':60} {'ms a step':>10} {'share':>7} {'calls':>7}"]
        for name in sorted(spent, key=lambda name: -spent[name])[:_OPERATORS]:
            lines.append(f"{name[:60]:60} {spent[name] / STEPS:10.2f} {spent[name] / total:7.1%} {calls[name]:7}")
        return lines


def _phase_lines(phases: dict[str, float], whole: float) -> list[str]:
    rows = {**phases, "between": whole - sum(phases.values())}
    lines = [f"{'phase':60} {'ms a step':>10} {'share':>7}"]
    lines += [f"{name:60} {spent / STEPS:10.2f} {spent / whole:7.1%}" for name, spent in rows.items()]
    return [*lines, f"{'step':60} {whole / STEPS:10.2f} {1:7.1%}"]
