"""Commands of the example scripts: a folder for their results, and commands shown as a user would type them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def make_folder(folder: Path, kind: str) -> None:
    """Create an empty folder. A folder that an earlier run of this kind made is replaced; any other must be empty."""
    marker = folder / f".{kind}"
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        sys.exit(f"{folder}: expected a new or empty folder, or one of an earlier {kind} run, found other files")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()


def retriever(*arguments: object) -> None:
    """Run a command of `retriever` in this environment, which need not be on PATH."""
    shell(sys.executable, "-m", "retriever", *arguments)


def shell(*arguments: object) -> None:
    """Print a command and run it. If it fails, exit with its exit code."""
    command = [str(word) for word in arguments]
    print(f"\n$ {shlex.join(command)}".replace(f"{sys.executable} -m retriever", "retriever"), flush=True)
    try:
        done = subprocess.run(command, check=False)
    except KeyboardInterrupt:
        sys.exit(1)
    if done.returncode:
        sys.exit(done.returncode)


def next_steps(*commands: tuple[object, ...]) -> str:
    """Text that shows how to activate the environment, and the given commands, from the current directory."""
    lines = ["", "To continue in this folder:"]
    # The shell scripts set this if the calling shell has not activated the environment that they use.
    if os.environ.get("RETRIEVER_ENVIRONMENT"):
        lines.append(f"  . {shlex.quote(_from_here(Path(sys.prefix) / 'bin' / 'activate'))}")
    for command in (("--help",), *commands):
        words = (_from_here(word) if isinstance(word, Path) else str(word) for word in command)
        lines.append(f"  retriever {shlex.join(words)}")
    return "\n".join(lines)


def _from_here(path: Path) -> str:
    """The shorter of the relative and the absolute path."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
