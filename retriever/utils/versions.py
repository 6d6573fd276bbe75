"""Versions of packages and the name of the device, for reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__version__ = "0.1.0"
"""Version of this package."""

# Packages whose version may change numerical results.
COMPUTING = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of this package and of installed packages; "unknown" if one is not installed."""
    return {"Python": platform.python_version(), "dense-retriever": __version__, **{p: _version(p) for p in packages}}


def device_name(device: torch.device) -> str:
    """Return a device with its hardware name: "cuda:0 (NVIDIA H200)"."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device} ({name})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
