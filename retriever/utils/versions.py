"""The versions and the device that a report names, because others may give other numbers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from retriever import __version__

if TYPE_CHECKING:
    import torch

# Packages of which other versions may give other numbers.
COMPUTING = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")


def versions(*packages: str) -> dict[str, str]:
    """Of Python, of this package, and of others by their names as they are installed: "unknown" where one is not."""
    return {"Python": platform.python_version(), "dense-retriever": __version__, **{p: _version(p) for p in packages}}


def device_name(device: torch.device) -> str:
    """The device and what it is: "cuda:0 (NVIDIA H200)"."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device} ({name})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
