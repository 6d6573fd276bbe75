"""Writing weights: safetensors files, with write errors raised as OSError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def writing_weights(path: Path) -> Iterator[None]:
    """Context in which write errors of safetensors and tokenizers, such as a full disk, are raised as OSError."""
    try:
        yield
    except Exception as error:
        # tokenizers raises a bare Exception that ends in "(os error 28)".
        if not isinstance(error, SafetensorError) and "(os error " not in str(error):
            raise
        raise OSError(f"{path}: cannot be written: {error}") from error


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors on any device to a safetensors file."""
    # safetensors refuses tied weights, which share memory. load_state_dict expects a copy of each.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with writing_weights(path):
        save_file(copies, path)


def save_encoder(model: Any, folder: Path) -> None:
    """Write a Hugging Face model to a folder, on any rank.

    `save_pretrained` alone writes only on rank 0 if a process group exists.
    """
    # transformers 5 calls this method to decide whether to write.
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        with writing_weights(folder):
            model.save_pretrained(folder)
    finally:
        del vars(model)["should_save_on_this_rank"]
