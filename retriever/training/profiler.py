"""Profile training steps: phases by the clock of the device, operators by torch's profiler."""

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

# Unprofiled steps, in which kernels are compiled and memory is allocated, and profiled steps.
WARM_UP, STEPS = 3, 3
TRACE = "profile.json.gz"
_MAX_OPERATORS = 15

Batch = TypeVar("Batch")

_clock: ContextVar[PhaseClock | None] = ContextVar("phase_clock", default=None)


@dataclass
class PhaseClock:
    """Records the start and end of phases. On a GPU these are events on the stream, without synchronization."""

    device: torch.device
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def now(self) -> Any:
        """Return a timestamp: a CUDA event, or seconds on a CPU."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """Return the total time of each phase, in the order of their first start. Synchronizes with the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        sums: dict[str, float] = {}
        for name, start, end in self.spans:
            elapsed = start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)
            sums[name] = sums.get(name, 0.0) + elapsed
        return sums


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Context for a phase of a step, shown in the table and trace of a profile. Phases must not be nested."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    with torch.profiler.record_function(name):
        start = clock.now()
        yield
        clock.spans.append((name, start, clock.now()))


class StepProfile:
    """Profiles `STEPS` steps of a run after `WARM_UP` steps.

    Args:
        device: device of the towers.
        folder: run folder, to which the trace is written.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self._clock = PhaseClock(device)
        self._trace = folder / TRACE
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._start: Any = None

    def watch(self, batches: Iterable[Batch], print_line: Callable[[str], None]) -> Iterator[Batch]:
        """Yield the batches unchanged and profile the work between two of them as a step.

        Args:
            batches: the batches of the run.
            print_line: called with each line of the profile when it is complete.
        """
        iterator = iter(batches)
        for step in itertools.count():
            if step == WARM_UP:
                self._begin()
            with phase("wait for a batch"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch
            if step + 1 == WARM_UP + STEPS:
                for line in self._end():
                    print_line(line)

    def _begin(self) -> None:
        _clock.set(self._clock)
        self._profiler.start()
        self._start = self._clock.now()

    def _end(self) -> list[str]:
        total = PhaseClock(self._clock.device, [("step", self._start, self._clock.now())]).milliseconds()["step"]
        self._profiler.stop()
        _clock.set(None)
        self._write_trace()
        return [
            *_phase_lines(self._clock.milliseconds(), total),
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
        # Kernels on a GPU, operators on a CPU; phases are left out.
        rows = [row for row in self._profiler.key_averages() if row.device_type == kind and not row.is_user_annotation]
        times = {row.key: (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1000 for row in rows}
        calls = {row.key: round(row.count / STEPS) for row in rows}
        total = sum(times.values())
        lines = [f"{'kernel' if cuda else 'operator':60} {'ms/step':>10} {'share':>7} {'calls':>7}"]
        for name in sorted(times, key=lambda name: -times[name])[:_MAX_OPERATORS]:
            lines.append(f"{name[:60]:60} {times[name] / STEPS:10.2f} {times[name] / total:7.1%} {calls[name]:7}")
        return lines


def _phase_lines(phases: dict[str, float], total: float) -> list[str]:
    rows = {**phases, "between": total - sum(phases.values())}
    lines = [f"{'phase':60} {'ms/step':>10} {'share':>7}"]
    lines += [f"{name:60} {elapsed / STEPS:10.2f} {elapsed / total:7.1%}" for name, elapsed in rows.items()]
    return [*lines, f"{'step':60} {total / STEPS:10.2f} {1:7.1%}"]
