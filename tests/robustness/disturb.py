"""Script: kill commands, fill their disk, starve them and run them twice at a time; then run them again.

    python tests/robustness/disturb.py --kills 200 --disks 40 --limits 40 --pairs 20 --seed 1 --csv figures.csv

A disturbed command ends in one line. Its inputs stay as they are. The rerun gives the files of an undisturbed run, and
nothing else is left. Full disks need the right to mount a small file system in memory; without it they are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib
import itertools
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Names that are no folder would be asked of the Hugging Face Hub, which takes 23 s without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "retriever"), str(HERE.parents[1])]

from artifacts import build  # noqa: E402
from children import in_child  # noqa: E402
from forks import LIBRARIES  # noqa: E402
from further import build_further  # noqa: E402
from scenarios import SCENARIOS, Scenario, prepare, snapshot, start  # noqa: E402
from tiny_model import tiny_model  # noqa: E402

# Seconds within which a command ends after SIGTERM, and an undisturbed one ends at all.
SECONDS = 120.0
KINDS = ("kills", "disks", "limits", "pairs")


@dataclass
class Command:
    """A scenario in its folder, with the files and the seconds of undisturbed runs."""

    name: str
    scenario: Scenario
    world: Path
    folder: Path
    expected: dict[str, str] = field(default_factory=dict)
    varying: set[str] = field(default_factory=set)
    seconds: float = 0.0
    written: int = 0
    """Bytes that it writes, at least the block of a disk."""
    limits: Iterator[str] = field(default_factory=lambda: itertools.cycle(("NOFILE", "AS", "FSIZE")))
    """What is limited next."""

    @property
    def log(self) -> Path:
        """Output of the last process."""
        return self.folder.with_suffix(".log")

    def measure(self) -> None:
        """Run it twice undisturbed. Files that differ between the two contain times, and only their names count."""
        found = []
        for _ in range(2):
            prepare(self.scenario, self.world, self.folder)
            size = folder_bytes(self.folder)
            began = time.perf_counter()
            code = wait(start(self.scenario, self.folder, self.log), SECONDS)
            self.seconds = time.perf_counter() - began
            assert code == 0, f"{self.name}: {code}: {self.log.read_text()}"
            found.append(snapshot(self.folder))
        assert found[0].keys() == found[1].keys(), (self.name, found[0].keys() ^ found[1].keys())
        self.expected, self.written = found[1], max(4096, folder_bytes(self.folder) - size)
        self.varying = {file for file in self.expected if found[0][file] != found[1][file]}

    def prepare(self) -> dict[str, str]:
        """Make the folder anew. Returns a snapshot of the inputs that the command does not change."""
        prepare(self.scenario, self.world, self.folder)
        return self.inputs()

    def inputs(self) -> dict[str, str]:
        """Return a snapshot of the inputs that the command does not change."""
        return snapshot(self.folder, tuple(name for name in self.scenario.inputs if name != self.scenario.output))

    def problem(self, code: int) -> str:
        """Return what is wrong with how the last process ended, or an empty text."""
        output = self.log.read_text(errors="replace")
        # torchrun shows a traceback of its own if a rank fails, or if it fails itself.
        explained = self.scenario.ranks > 1 and ("retriever: " in output or "/retriever/" not in output)
        if ("Traceback" in output or "Fatal Python error" in output) and not explained:
            return f"traceback: {output[-3000:]}"
        if code == -signal.SIGKILL:
            return "hang"
        if code < 0 and code != -signal.SIGTERM:
            return f"signal {-code}: {output[-2000:]}"
        return "" if code in (0, 1, 2) or code == -signal.SIGTERM else f"exit code {code}: {output[-2000:]}"

    def rerun(self, before: dict[str, str]) -> str:
        """Run it again without disturbance and compare. Returns what is wrong, or an empty text."""
        code = wait(start(self.scenario, self.folder, self.log), SECONDS)
        # It was killed after it had finished, and does not replace what it has written.
        finished = "remove it or name another" in self.log.read_text(errors="replace")
        if code != 0 and not finished:
            return f"rerun: exit code {code}: {self.log.read_text()[-2000:]}"
        if self.inputs() != before:
            return "an input was changed"
        found = snapshot(self.folder)
        if extra := found.keys() ^ self.expected.keys():
            return f"files that only one of the runs has: {sorted(extra)}"
        differing = [file for file in found if found[file] != self.expected[file] and file not in self.varying]
        return f"files that differ: {differing}" if differing else ""


def folder_bytes(folder: Path) -> int:
    """Return the size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def wait(child: int, seconds: float) -> int:
    """Wait for a child; kill its session if it takes longer. Returns its exit code, or minus its signal."""
    descriptor = os.pidfd_open(child)
    try:
        if not select.select([descriptor], [], [], seconds)[0]:
            kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(descriptor)


def kill(child: int, number: int) -> None:
    """Send a signal to all processes of a session."""
    for _ in range(100):
        # The child may not have made its session yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, number)
            return
        time.sleep(0.001)


def kills(command: Command, rng: random.Random, before: dict[str, str]) -> str:
    """Kill it at a random moment, two times in three by SIGKILL, otherwise by several SIGTERM."""
    child = start(command.scenario, command.folder, command.log)
    time.sleep(rng.uniform(0, command.seconds))
    if rng.random() < 2 / 3:
        kill(child, signal.SIGKILL)
        wait(child, SECONDS)
        return ""
    for _ in range(3):
        kill(child, signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.05))
    return command.problem(wait(child, SECONDS))


def disks(command: Command, rng: random.Random, before: dict[str, str]) -> str:
    """Fill its disk at a random number of bytes."""
    disk = os.statvfs(command.folder)
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    # Temporary files take space, too.
    _mount(command.folder, f"remount,size={used + rng.randrange(2 * command.written)}")
    problem = command.problem(wait(start(command.scenario, command.folder, command.log), SECONDS))
    _mount(command.folder, "remount,size=1g")
    return problem


def limits(command: Command, rng: random.Random, before: dict[str, str]) -> str:
    """Give it few file descriptors, little memory, or small files, in turn."""
    kind = next(command.limits)
    if kind == "NOFILE":
        # With fewer than 12 Python does not start; with fewer than 20 torchrun waits for itself for minutes.
        value = rng.randrange(12 if command.scenario.ranks == 1 else 20, 64)
    elif kind == "AS":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        value = pages * resource.getpagesize() + rng.randrange(2**28)
    else:
        value = rng.randrange(2**17)
    number = getattr(resource, f"RLIMIT_{kind}")

    def limit() -> None:
        resource.setrlimit(number, (value, value))

    code = wait(start(command.scenario, command.folder, command.log, limit), SECONDS)
    output = command.log.read_text(errors="replace")
    if kind == "AS" and (code < 0 or any(word in output for word in ("(SIGABRT)", "(SIGSEGV)", "thread-local data"))):
        # Without memory, libraries in C and C++ end the process; what it leaves is looked at.
        return ""
    problem = command.problem(code)
    return f"{kind} {value}: {problem}" if problem else ""


def pairs(command: Command, rng: random.Random, before: dict[str, str]) -> str:
    """Run it twice at a time in one folder."""
    one = start(command.scenario, command.folder, command.log)
    time.sleep(rng.uniform(0, command.seconds / 2))
    other_log = command.log.with_suffix(".other")
    other = start(command.scenario, command.folder, other_log)
    codes = [wait(child, SECONDS) for child in (one, other)]
    problem = command.problem(codes[0])
    other_log.replace(command.log)
    problem = problem or command.problem(codes[1])
    return problem or ("" if 0 in codes else f"neither of two succeeded: {command.log.read_text()[-1000:]}")


DISTURBANCES: dict[str, Callable[[Command, random.Random, dict[str, str]], str]] = {
    "kills": kills,
    "disks": disks,
    "limits": limits,
    "pairs": pairs,
}


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Context with a file system in memory at the folder. Yields whether it could be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _mount(folder, "size=1g")
    except (subprocess.CalledProcessError, FileNotFoundError):
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main(words: list[str]) -> int:
    """Disturb the commands; the exit code is 1 if anything goes wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help=f"number of {kind} over all commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", action="append", help="only this command; may be repeated")
    parser.add_argument("--csv", type=Path, help="file of figures, one row per command")
    parser.add_argument("--work", type=Path, help="folder of the artifacts, which are kept. Default: a temporary one")
    arguments = parser.parse_args(words)
    for module in (*LIBRARIES, "datasets", "PIL.Image", "pyarrow.parquet"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    rows, faults = [], 0
    with tempfile.TemporaryDirectory(prefix="robustness-") as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        if not (work / "artifacts").exists():
            in_child(lambda: build(work / "artifacts", tiny_model(work / "tokenizer")))
        names = arguments.command or list(SCENARIOS)
        wanted = {entry for name in names for entry in SCENARIOS[name].inputs}
        in_child(lambda: build_further(work / "artifacts", wanted))
        for number, name in enumerate(names):
            with small_disk(work / "disk") as mounted:
                command = Command(name, SCENARIOS[name], work / "artifacts", work / "disk")
                command.measure()
                counts: Counter[str] = Counter()
                for kind in KINDS:
                    count = getattr(arguments, kind)
                    for trial in range(number, count, len(names)):
                        if kind == "disks" and not mounted:
                            continue
                        counts[kind] += 1
                        before = command.prepare()
                        rng = random.Random(f"{arguments.seed} {name} {kind} {trial}")
                        problem = DISTURBANCES[kind](command, rng, before) or command.rerun(before)
                        if problem:
                            counts["faults"] += 1
                            print(f"FAULT {name}: {kind} {trial}: {problem}", flush=True)
                            shutil.copy(command.log, work / f"{name} {kind} {trial}.log".replace(" ", "_"))
            rows.append({"command": name, **{kind: counts[kind] for kind in KINDS}, "faults": counts["faults"]})
            faults += counts["faults"]
            print(f"{name}: {command.seconds:.1f} s undisturbed; {dict(counts)}", flush=True)
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    totals = ", ".join(f"{sum(row[kind] for row in rows):,} {kind}" for kind in KINDS)
    print(f"{totals}, {faults:,} faults, seed {arguments.seed}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
