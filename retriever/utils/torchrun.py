"""What torchrun tells each process in environment variables, checked; without torch, which takes seconds to import."""

from __future__ import annotations

import os
import re

from retriever.errors import ConfigError


def world_size() -> int:
    """How many processes torchrun started, on all machines; 1 without it.

    Raises:
        ConfigError: WORLD_SIZE is not a number of processes.
    """
    found = os.environ.get("WORLD_SIZE", "1")
    if not _is_number(found) or int(found) < 1:
        raise ConfigError(f"WORLD_SIZE: expected a number of processes, as torchrun sets it, found {found!r:.40}")
    return int(found)


def rank() -> int:
    """The number of this process, from 0; 0 without torchrun. `check_environment` has checked it."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int | None:
    """The number of this process on its machine; None where it is not set."""
    return _number("LOCAL_RANK", None)


def local_world_size() -> int:
    """How many processes torchrun started on this machine; 1 without it."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1) or 1


def restart_count() -> int:
    """How many times torchrun has started this job's processes before: 0 at first."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) or 0


def check_environment() -> None:
    """Refuse an environment that torchrun does not make.

    A variable that is not a number, a RANK that is not below WORLD_SIZE, a RANK without a WORLD_SIZE (each process
    would take itself for the only one), and a WORLD_SIZE above 1 without RANK, MASTER_ADDR or MASTER_PORT.

    Raises:
        ConfigError: names the variable, what was expected and what was found.
    """
    size = world_size()
    if "WORLD_SIZE" not in os.environ and "RANK" in os.environ:
        raise ConfigError(f"RANK is set ({os.environ['RANK']!r:.40}), but WORLD_SIZE is not: torchrun sets both")
    needed = {"RANK": size, "MASTER_ADDR": None, "MASTER_PORT": 2**16} if size > 1 else {"RANK": size}
    for name, below in needed.items():
        if size > 1 and name not in os.environ:
            raise ConfigError(f"WORLD_SIZE is set, as under torchrun, but: variable {name} expected, but not set")
        if below is not None:
            _number(name, 0, below=below)
    count = local_world_size()
    _number("LOCAL_RANK", None, below=count if "LOCAL_WORLD_SIZE" in os.environ else None)
    restart_count()


def _number(name: str, default: int | None, *, least: int = 0, below: int | None = None) -> int | None:
    found = os.environ.get(name)
    if found is None:
        return default
    if not _is_number(found) or int(found) < least or (below is not None and int(found) >= below):
        wanted = f"a number from {least} " + ("on" if below is None else f"to {below - 1}")
        known = "WORLD_SIZE is set, as under torchrun, but: " if "WORLD_SIZE" in os.environ else ""
        raise ConfigError(f"{known}{name}: expected {wanted}, found {found!r:.40}")
    return int(found)


def _is_number(text: str) -> bool:
    # Python's int takes spaces, signs, underscores and the digits of other scripts, too.
    return re.fullmatch(r"[0-9]{1,9}", text) is not None
