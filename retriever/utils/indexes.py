"""Opening indexes, and choosing the device that searches them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from index.ann.gpu.search import Spread
from index.ann.index import Index
from index.ann.layout import FAISS_FILE, LISTS_FILE
from index.ann.multi_index import MultiIndex, open_all
from index.progress import Reporter
from retriever.errors import ArgumentError, check_choice
from retriever.utils.check_progress import checksum_progress

if TYPE_CHECKING:
    import torch


def open_indexes(
    folders: Sequence[Path], reporter: Reporter, *, mmap: bool = False, verify: bool = False
) -> Index | MultiIndex:
    """Open the index in a folder, or the indexes in several folders as one.

    Args:
        folders: the folders.
        reporter: shows the progress of verification.
        mmap: memory-map the indexes instead of loading them.
        verify: verify the checksums of all files first. Otherwise only files that are loaded completely or are small
            are verified, and the sizes of the others are compared.

    Raises:
        InputError: see `index.ann.multi_index.open_all`; or a file is damaged.
    """
    with checksum_progress(reporter, folders, None if verify else [FAISS_FILE, LISTS_FILE]) as checked:
        return open_all(folders, verify="hash" if verify else "size", mmap=mmap, progress=checked)


def check_index_device(name: str) -> None:
    """Check the name of a device for indexes.

    Raises:
        ConfigError: it is not auto, cpu or cuda[:number].
    """
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:(\d|[1-9]\d))?", name):
        raise ArgumentError("index_device", f"expected auto, cpu or cuda[:number], found {name!r}")


def check_index_options(index_device: str, index_spread: str, *, index: bool) -> None:
    """Check where an index is to be searched.

    Args:
        index_device: As for `place_index`.
        index_spread: As for `place_index`.
        index: Whether an index is searched at all.

    Raises:
        ConfigError: A value is unknown, or one is given without an index.
    """
    check_index_device(index_device)
    check_choice(get_args(Spread), index_spread=index_spread)
    for name, value in {"index_device": index_device, "index_spread": index_spread}.items():
        if value != "auto" and not index:
            raise ArgumentError(name, f"expected together with an index, found {value} without one")


def place_index(
    index: Index | MultiIndex,
    model_device: torch.device,
    reporter: Reporter,
    *,
    index_device: str = "auto",
    index_spread: Spread = "auto",
) -> None:
    """Choose where an index is searched.

    Args:
        index: one index, or several searched as one.
        model_device: the device of the model.
        reporter: reports where the index is searched if there is a GPU.
        index_device: "cpu", "cuda", "cuda:1" …; "auto": the model's GPU if it has one and if that is possible.
        index_spread: how several GPUs are used, see `Index.to`.

    Raises:
        InputError: the index cannot be searched on the requested GPUs.
    """
    check_index_device(index_device)
    check_choice(get_args(Spread), index_spread=index_spread)
    if index_device != "auto":
        index.to(index_device, spread=index_spread, note=reporter.line)
    elif model_device.type == "cuda":
        index.to(str(model_device), spread=index_spread, optional=True, note=reporter.line)
