"""What the example runs share: a folder made anew, and commands shown as a user would type them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def make_anew(folder: Path, kind: str) -> None:
    """An empty folder, in place of what an earlier run of this kind made there; nothing else is removed."""
    marker = folder / f".{kind}"
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        sys.exit(f"{folder}: expected a new or empty folder, or one that an earlier {kind} run made")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()


def retriever(*words: object) -> None:
    """Run a command of this environment, which need not be on the PATH."""
    shell(sys.executable, "-m", "retriever", *words)


def shell(*words: object) -> None:
    """Print a command and run it; if it fails, this process ends with its exit code."""
    command = [str(word) for word in words]
    print(f"\n$ {shlex.join(command)}".replace(f"{sys.executable} -m retriever", "retriever"), flush=True)
    try:
        done = subprocess.run(command, check=False)
    except KeyboardInterrupt:
        sys.exit(1)
    if done.returncode:
        sys.exit(done.returncode)


def next_steps(*commands: tuple[object, ...]) -> str:
    """What to type afterwards, where the script was called: how to reach `retriever`, and some commands."""
    lines = ["", "To go on, from this folder:"]
    # Set by the shell scripts where the calling shell is not in the environment that they used.
    if os.environ.get("RETRIEVER_ENVIRONMENT"):
        lines.append(f"  . {shlex.quote(_from_here(Path(sys.prefix) / 'bin' / 'activate'))}")
    for command in (("--help",), *commands):
        words = (_from_here(word) if isinstance(word, Path) else str(word) for word in command)
        lines.append(f"  retriever {shlex.join(words)}")
    return "\n".join(lines)


def _from_here(path: Path) -> str:
    """The path as it is shortest to type."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
