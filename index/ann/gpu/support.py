"""Whether faiss can use GPUs, which ones, and how much memory they have."""

from __future__ import annotations

import re
from typing import Literal

from index.ann.factory import import_faiss
from index.files import ArgumentError, InputError

INSTEAD = "pip uninstall -y faiss-cpu && pip install faiss-gpu-cuvs"
# What faiss reserves on a GPU besides the index: workspace, and buffers of cuBLAS.
WORKSPACE_BYTES = 2**31


class NotOnGpu(InputError):
    """An index cannot be searched on the requested GPUs; the message says why."""


def check_support() -> None:
    """Check that faiss can use a GPU.

    Raises:
        NotOnGpu: this faiss has no GPU support, or finds no GPU.
    """
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise NotOnGpu(f"this faiss ({faiss.__version__}) has no GPU support: {INSTEAD}")
    if faiss.get_num_gpus() == 0:
        raise NotOnGpu("faiss found no GPU")


def has_gpu() -> bool:
    """Whether there is a GPU, whatever faiss can do with it."""
    import torch

    return torch.cuda.is_available()


def check_gpus() -> None:
    """Check that GPUs can be used to build an index.

    Raises:
        ArgumentError: this faiss has no GPU support, or finds no GPU.
    """
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise ArgumentError("gpu", f"expected a faiss with GPU support: {INSTEAD}")
    if faiss.get_num_gpus() == 0:
        raise ArgumentError("gpu", "expected a GPU, faiss found none")


def free_bytes(gpu: int) -> int:
    """Free memory of a GPU."""
    import torch

    return int(torch.cuda.mem_get_info(gpu)[0])


def check_memory(gpu: int, needed: int, what: str) -> None:
    """Check that a GPU has `needed` bytes, and faiss's workspace, free.

    Raises:
        NotOnGpu: it has less; `what` begins the message.
    """
    if (free := free_bytes(gpu)) < needed + WORKSPACE_BYTES:
        raise NotOnGpu(f"{what}: {_expected(needed)} on cuda:{gpu}, found {free / 2**20:,.0f}")


def choose_gpus(device: str, spread: str, needed: int) -> tuple[list[int], Literal["shards", "replicas"]]:
    """The GPUs for an index of `needed` bytes, and how it is spread over them.

    Args:
        device: "cuda:1" is one GPU, "cuda" all of them.
        spread: "shards", "replicas" or "auto": one GPU if it holds the index, else shards.
        needed: bytes of the whole index.

    Raises:
        NotOnGpu: there is no such GPU, or the free memory is too small.
    """
    count = import_faiss().get_num_gpus()
    gpus = list(range(count))
    if found := re.fullmatch(r"cuda:(\d+)", device):
        gpus = [int(found[1])]
        if gpus[0] >= count:
            raise NotOnGpu(f"expected a GPU from cuda:0 to cuda:{count - 1}, found {device}")
    free = [free_bytes(gpu) for gpu in gpus]
    whole, part = needed + WORKSPACE_BYTES, needed // len(gpus) + WORKSPACE_BYTES
    if spread == "auto" and free[0] >= whole:
        return gpus[:1], "replicas"
    if spread == "replicas" and min(free) >= whole:
        return gpus, "replicas"
    if spread != "replicas" and len(gpus) > 1 and min(free) >= part:
        return gpus, "shards"
    if spread == "shards" and len(gpus) == 1 and free[0] >= whole:
        return gpus, "replicas"
    each = needed if spread == "replicas" else needed // len(gpus)
    raise NotOnGpu(f"{_expected(each)} on {', '.join(f'cuda:{gpu}' for gpu in gpus)}, found {min(free) / 2**20:,.0f}")


def _expected(needed: int) -> str:
    total, workspace = (needed + WORKSPACE_BYTES) / 2**20, WORKSPACE_BYTES / 2**20
    return f"expected {total:,.0f} MiB of free memory ({workspace:,.0f} of them faiss's workspace)"
