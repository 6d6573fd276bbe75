"""The hardware, versions and commit that every measured row states."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from scripts import ROOT


def machine(commit: str | None = None) -> dict[str, str]:
    """Columns of a row of scripts/results/*.csv: commit, hardware, and versions of Python and PyTorch.

    Args:
        commit: The commit to state where the checkout has no git repository. Default: the checked-out commit.
    """
    return {
        "commit": commit or checked_out_commit(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def hardware() -> str:
    """Name of the GPU, or of the CPU with the number of cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {_cpu_name()}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def checked_out_commit() -> str:
    """Short hash of the checked-out commit, or "unknown" outside a git repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
