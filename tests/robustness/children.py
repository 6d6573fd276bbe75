"""Run cases in forked children with limits of memory and time, and judge how each of them ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from index.files import InputError
from retriever.cli.command_line import main

SECONDS = 20.0
"""Processor time of a case; one that takes more hangs."""
WALL_SECONDS = 60.0
"""Time of a case on the clock, which on a busy machine is longer than its processor time."""
MEMORY_MIB = 3 * 1024
"""Largest resident memory of a case."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    kind: str
    """ok, refused, or a fault: traceback, message, crash, hang, memory, accepted, not read, descriptors."""
    detail: str
    seconds: float = 0.0
    mib: int = 0

    @property
    def is_fault(self) -> bool:
        """Whether the case must not end so."""
        return self.kind not in ("ok", "refused")


def run_command(words: Sequence[object]) -> Outcome:
    """Run a command line in this process: one line and exit code 1 or 2, or 0."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - what a user would see
            return Outcome("traceback", traceback.format_exc()[-3000:])
    lines = [line for line in err.getvalue().splitlines() if line.startswith("retriever: ")]
    if "Traceback" in err.getvalue():
        return Outcome("traceback", err.getvalue()[-3000:])
    if code == 0:
        return Outcome("ok", "")
    last = (err.getvalue().strip().splitlines() or [""])[-1]
    if code not in (1, 2) or len(lines) != 1 or last != lines[0]:
        # An answer such as "the target recall is not met" has exit code 1 and no error.
        silent = code == 1 and not lines and (out.getvalue() or err.getvalue())
        return Outcome("refused" if silent else "message", f"exit code {code}: {err.getvalue()[-2000:]}")
    return _judge_message(last, most=2000)


def run_function(function: Callable[[], object]) -> Outcome:
    """Call a reader: it returns, or raises what the command line prints as one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function()
    except InputError as error:
        return _judge_message(str(error))
    except OSError as error:
        return Outcome("refused" if error.filename else "traceback", f"{error.filename}: {error.strerror or error}")
    except BaseException:  # noqa: BLE001 - the fault that is looked for
        return Outcome("traceback", traceback.format_exc()[-3000:])
    return Outcome("ok", "")


def _judge_message(text: str, most: int = 2**20) -> Outcome:
    if "\n" in text or len(text) > most:
        return Outcome("message", f"{len(text)} characters, {text.count(chr(10))} line ends: {text[:500]!r}")
    return Outcome("refused", text)


def run_cases(cases: Sequence[int], run: Callable[[int], Outcome], *, as_mib: int = 6 * 1024) -> Iterator[Outcome]:
    """Run cases in a forked child, or in several if some of them crash or hang. Yields an outcome for each, in order.

    Args:
        cases: numbers of the cases.
        run: runs one of them.
        as_mib: limit of the child's address space above that of this process.
    """
    left = list(cases)
    while left:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            _child(left, run, writer, as_mib)
        os.close(writer)
        done = 0
        for outcome in _outcomes(child, reader, len(left)):
            yield outcome
            done += 1
        os.close(reader)
        left = left[done:]


def _child(cases: Sequence[int], run: Callable[[int], Outcome], writer: int, as_mib: int) -> None:
    code = 1
    try:
        os.setsid()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + as_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        devnull = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(devnull, descriptor)
        for case in cases:
            _reset_peak()
            start, before = time.process_time(), _descriptors()
            outcome = run(case)
            seconds, mib = time.process_time() - start, _peak_mib()
            if mib > MEMORY_MIB:
                outcome = Outcome("memory", f"{mib} MiB; {outcome.kind}: {outcome.detail}")
            # Libraries open some at their first use; a leak adds some with every case.
            elif not outcome.is_fault and _descriptors() > before + 16:
                outcome = Outcome("descriptors", f"{before} before, {_descriptors()} after")
            line = json.dumps([outcome.kind, outcome.detail, seconds, mib]) + "\n"
            os.write(writer, line.encode())
        code = 0
    finally:
        os._exit(code)


def _outcomes(child: int, reader: int, count: int) -> Iterator[Outcome]:
    buffer = b""
    while count:
        start = time.perf_counter()
        ready = select.select([reader], [], [], WALL_SECONDS)[0]
        data = os.read(reader, 2**20) if ready else b""
        if not data:
            if not ready:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            kind = "crash" if ready else "hang"
            yield Outcome(kind, f"status {os.waitstatus_to_exitcode(status)}", time.perf_counter() - start)
            return
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            kind, detail, seconds, mib = json.loads(line)
            count -= 1
            if seconds > SECONDS and kind in ("ok", "refused"):
                kind, detail = "hang", f"{seconds:.0f} s; {detail}"
            yield Outcome(kind, detail, seconds, mib)
    os.waitpid(child, 0)


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_mib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def in_child(function: Callable[[], object]) -> None:
    """Call a function in a fork, so that this process starts none of the threads of libraries."""
    child = os.fork()
    if not child:
        code = 1
        try:
            function()
            code = 0
        except BaseException:  # noqa: BLE001 - printed as Python does
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"a child ended with {os.waitstatus_to_exitcode(status)}"
