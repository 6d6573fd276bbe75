"""Read and check the environment variables of torchrun, without importing torch, which takes seconds."""

from __future__ import annotations

import os
import re

from retriever.errors import ConfigError


def world_size() -> int:
    """Return the number of processes that torchrun started on all machines, or 1 without torchrun.

    Raises:
        ConfigError: WORLD_SIZE is not a number of processes.
    """
    found = os.environ.get("WORLD_SIZE", "1")
    if not _is_number(found) or int(found) < 1:
        raise ConfigError(f"WORLD_SIZE: expected a number of processes, as torchrun sets it, found {found!r:.40}")
    return int(found)


def rank() -> int:
    """Return the rank of this process, or 0 without torchrun. Call `check_environment` first."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int | None:
    """Return the rank of this process on its machine, or None if LOCAL_RANK is not set."""
    return _number("LOCAL_RANK", None)


def local_world_size() -> int:
    """Return the number of processes that torchrun started on this machine, or 1 without torchrun."""
    return _number("LOCAL_WORLD_SIZE", 1, minimum=1) or 1


def restart_count() -> int:
    """Return how often torchrun has restarted the processes of this job; 0 at first."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) or 0


def check_environment() -> None:
    """Check the environment variables of torchrun.

    Raises:
        ConfigError: a variable is not a number, RANK is not below WORLD_SIZE, RANK is set without WORLD_SIZE (every
            process would run as the only one), or WORLD_SIZE is above 1 without RANK, MASTER_ADDR or MASTER_PORT.
    """
    size = world_size()
    if "WORLD_SIZE" not in os.environ and "RANK" in os.environ:
        raise ConfigError(f"RANK is set ({os.environ['RANK']!r:.40}), but WORLD_SIZE is not: torchrun sets both")
    required = {"RANK": size, "MASTER_ADDR": None, "MASTER_PORT": 2**16} if size > 1 else {"RANK": size}
    for name, below in required.items():
        if size > 1 and name not in os.environ:
            raise ConfigError(f"WORLD_SIZE is set, as under torchrun, but: variable {name} expected, but not set")
        if below is not None:
            _number(name, 0, below=below)
    count = local_world_size()
    _number("LOCAL_RANK", None, below=count if "LOCAL_WORLD_SIZE" in os.environ else None)
    restart_count()


def _number(name: str, default: int | None, *, minimum: int = 0, below: int | None = None) -> int | None:
    found = os.environ.get(name)
    if found is None:
        return default
    if not _is_number(found) or int(found) < minimum or (below is not None and int(found) >= below):
        expected = f"a number from {minimum} " + ("on" if below is None else f"to {below - 1}")
        prefix = "WORLD_SIZE is set, as under torchrun, but: " if "WORLD_SIZE" in os.environ else ""
        raise ConfigError(f"{prefix}{name}: expected {expected}, found {found!r:.40}")
    return int(found)


def _is_number(text: str) -> bool:
    # `int` also accepts spaces, signs, underscores and digits of other scripts.
    return re.fullmatch(r"[0-9]{1,9}", text) is not None
