"""Time and memory of a loss with its gradients. On a GPU, CUDA events measure the time."""

from __future__ import annotations

import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from scripts.benchmarks.losses.loss_methods import Method, Pairs, UnavailableError

Returned = TypeVar("Returned")

MIB = 2**20
SHORT_MS = 5.0
# Products before a call that keep the device busy while the host launches the first kernels.
LEAD_PRODUCTS, LEAD_SIZE = 24, 4096
MOST_SAMPLES = 25
ROOMY_MIB = 12288


@dataclass(frozen=True)
class Problem:
    """Why there is no measurement.

    grows: larger batches have the same problem. ours_to_mend: a bug, not a limit of the machine.
    """

    text: str
    grows: bool = False
    ours_to_mend: bool = False


@dataclass
class Outcome:
    """Median milliseconds per call, number of samples, loss, and peak device memory.

    extra_mib: beyond the embeddings; includes the gradients. total_mib: all that was allocated.
    """

    milliseconds: float | None = None
    samples: int = 0
    extra_mib: float | None = None
    total_mib: float | None = None
    loss: float | None = None
    problem: Problem | None = None


def attempted(call: Callable[[], Returned], cuda: bool) -> Returned | Problem:
    """The result of a call, or the problem that stopped it. Other packages raise many kinds of errors."""
    try:
        returned = call()
        if cuda:
            torch.cuda.synchronize()
        return returned
    except torch.OutOfMemoryError:
        return Problem("out of memory", grows=True)
    except UnavailableError as reason:
        return Problem(str(reason), grows=True)
    except ImportError as error:
        return Problem(f"not installed: {error}", grows=True)
    except (RuntimeError, AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return failed(error)
    except _triton_errors() as error:
        return failed(error)


def failed(error: BaseException) -> Problem:
    """Describe an error in one line."""
    first = (str(error).strip().splitlines() or [""])[0][:160]
    return Problem(f"failed: {type(error).__name__}: {first}", grows=True, ours_to_mend=True)


@functools.cache
def _triton_errors() -> type[BaseException]:
    try:
        from triton.errors import TritonError
    except ImportError:
        return UnavailableError
    return TritonError


@dataclass
class _Turn:
    """A method to measure: calls per sample, number of samples, and the samples so far.

    With `led`, a call is issued behind matrix products that keep the device busy while the host launches it, as the
    towers do in training. Short calls are issued one after the other, at the pace of the host.
    """

    method: Method
    calls: int
    led: bool
    wanted: int
    samples: list[float] = field(default_factory=list)


class Clock:
    """Measures calls on one device."""

    def __init__(self, device: str, seconds: float) -> None:
        self.cuda = device == "cuda"
        self.device = device
        self.seconds = seconds
        self.lead = torch.randn(3 if self.cuda else 0, LEAD_SIZE, LEAD_SIZE, device=device, dtype=torch.bfloat16)

    def measure(self, methods: list[Method], pairs: Pairs, deadline: float) -> dict[str, Outcome]:
        """Warm up each method, then time them alternately, so that disturbances affect all alike.

        Methods that fill much of the memory are timed by themselves: otherwise the allocator would free its cache
        within the measured time of a call.
        """
        outcomes, turns = {}, []
        for method in methods:
            outcome, turn = self.warm_up(method, pairs, deadline)
            outcomes[method.name] = outcome
            if turn is None:
                continue
            if (outcome.extra_mib or 0) > ROOMY_MIB:
                self.sample([turn], pairs, outcomes)
                torch.cuda.empty_cache()
            else:
                turns.append(turn)
        self.sample(turns, pairs, outcomes)
        return outcomes

    def warm_up(self, method: Method, pairs: Pairs, deadline: float) -> tuple[Outcome, _Turn | None]:
        """Compile and allocate, measure memory, and choose the number of samples."""
        if time.monotonic() > deadline:
            return Outcome(problem=Problem("no time left")), None
        loss = attempted(lambda: method.run(pairs).loss.item(), self.cuda)
        if isinstance(loss, Problem):
            if self.cuda:
                torch.cuda.empty_cache()
            return Outcome(problem=loss), None
        outcome = Outcome(loss=loss)
        if self.cuda:
            # Memory beyond the embeddings, such as the workspace of cuBLAS, belongs to no method.
            held = torch.cuda.memory_allocated() / MIB
            torch.cuda.reset_peak_memory_stats()
        milliseconds = attempted(lambda: self.time(method, pairs, 1), self.cuda)
        if isinstance(milliseconds, Problem):
            return Outcome(problem=milliseconds), None
        if self.cuda:
            peak = torch.cuda.max_memory_allocated() / MIB
            outcome.total_mib, outcome.extra_mib = peak - self.lead.nbytes / MIB, peak - held
        if milliseconds > 1000 * self.seconds:
            outcome.milliseconds, outcome.samples = milliseconds, 1
            return outcome, None
        if milliseconds < 10 * SHORT_MS:
            # The first call may include allocations.
            again = attempted(lambda: self.time(method, pairs, 1), self.cuda)
            if isinstance(again, Problem):
                return Outcome(problem=again), None
            milliseconds = min(milliseconds, again)
        calls = max(1, round(SHORT_MS / milliseconds)) if self.cuda else 1
        wanted = int(min(MOST_SAMPLES, max(1, 1000 * self.seconds / (milliseconds * calls))))
        return outcome, _Turn(method, calls, milliseconds >= SHORT_MS, wanted)

    def sample(self, turns: list[_Turn], pairs: Pairs, outcomes: dict[str, Outcome]) -> None:
        """Time the methods alternately until each has its samples."""
        while waiting := [turn for turn in turns if len(turn.samples) < turn.wanted]:
            for turn in waiting:
                sample = attempted(functools.partial(self.time, turn.method, pairs, turn.calls, turn.led), self.cuda)
                if isinstance(sample, Problem):
                    outcomes[turn.method.name].problem, turn.wanted = sample, 0
                else:
                    turn.samples.append(sample)
        for turn in turns:
            outcome = outcomes[turn.method.name]
            if outcome.problem is None:
                outcome.milliseconds, outcome.samples = statistics.median(turn.samples), len(turn.samples)

    def time(self, method: Method, pairs: Pairs, calls: int, led: bool = False) -> float:
        """Milliseconds per call, of `calls` calls in a row."""
        return self.milliseconds(lambda: method.run(pairs), calls, led)

    def milliseconds(self, run: Callable[[], object], calls: int, led: bool = False) -> float:
        """Milliseconds per call, of `calls` calls in a row; `led`: behind products that hide the launches."""
        if not self.cuda:
            started = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - started) * 1000 / calls
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(LEAD_PRODUCTS if led else 0):
            torch.mm(self.lead[0], self.lead[1], out=self.lead[2])
        first.record()
        for _ in range(calls):
            run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / calls

    @staticmethod
    @functools.cache
    def version(package: str) -> str:
        """Name and version of an installed package; for triton only the version."""
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""
        return version if package == "triton" else f"{package} {version}"


def best_product(clock: Clock, size: int) -> float:
    """Median milliseconds of 20 bf16 products [size, size] × [size, size], after a warm-up."""
    left, right = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    return statistics.median(clock.milliseconds(lambda: left @ right, 1) for _ in range(20))
