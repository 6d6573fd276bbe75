"""The versions and the device that a report names, because others may give other numbers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from retriever import __version__


def versions(*packages: str) -> dict[str, str]:
    """Of Python, of this package, and of others by their names as they are installed: "unknown" where one is not."""
    return {"Python": platform.python_version(), "dense-retriever": __version__, **{p: _version(p) for p in packages}}


def device_name(device: torch.device) -> str:
    """The device and what it is: "cuda:0 (NVIDIA H200)"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device} ({name})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
