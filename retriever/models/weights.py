"""Tensors on disk: safetensors files, and the errors of writing them as the system's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def writing_weights(place: Path) -> Iterator[None]:
    """In the body, what safetensors and tokenizers raise for a full disk is raised as the OSError that it is."""
    try:
        yield
    except Exception as error:
        # tokenizers raises a bare Exception that ends in "(os error 28)".
        if not isinstance(error, SafetensorError) and "(os error " not in str(error):
            raise
        raise OSError(f"{place}: cannot be written: {error}") from error


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors, from whatever device, to a safetensors file."""
    # Tied weights share memory, which safetensors refuses; a copy each is what load_state_dict expects.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with writing_weights(path):
        save_file(copies, path)


def save_encoder(model: Any, folder: Path) -> None:
    """Write a Hugging Face model to a folder, on whichever of several processes calls it.

    By itself `save_pretrained` writes on the first process alone, where a process group has been made.
    """
    # Newer versions of transformers ask this method.
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        with writing_weights(folder):
            model.save_pretrained(folder)
    finally:
        del vars(model)["should_save_on_this_rank"]
