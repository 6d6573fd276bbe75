"""What a measured result must state: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from scripts import ROOT


def machine() -> dict[str, str]:
    """Columns for a row of scripts/results/*.csv."""
    return {"commit": commit(), "hardware": hardware(), "python": platform.python_version(), "torch": torch.__version__}


def hardware() -> str:
    """The GPU's name, or the processor's with the number of cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {_processor()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout; "unknown" outside one."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
