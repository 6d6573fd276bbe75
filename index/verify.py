"""Checking a whole embedding store or index, every byte of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from index.ann.index import Index
from index.files import InputError
from index.manifest import EMBEDDINGS, INDEX, read_manifest
from index.store.reader import EmbeddingStore


@dataclass(frozen=True)
class Summary:
    """What a folder holds that was found whole: its format, rows, dimensions, number of files, and their bytes."""

    format: str
    rows: int
    dim: int
    files: int
    bytes: int


def verify(folder: Path, progress: Callable[[int], None] | None = None) -> Summary:
    """Check every byte of the embedding store or index in `folder` against its manifest.

    Args:
        folder: of the store or index.
        progress: called with the number of bytes just checked.

    Raises:
        InputError: a file is missing or damaged, the message names it; or the folder holds neither.
    """
    manifest = read_manifest(folder)
    held: EmbeddingStore | Index
    if manifest.format == EMBEDDINGS:
        held = EmbeddingStore(manifest)
    elif manifest.format == INDEX:
        # Mapped: an index that is larger than memory must be verifiable too.
        held = Index(manifest, mmap=True)
    else:
        raise InputError(f"{folder}: expected an embedding store or an index, found a {manifest.format}")
    # Before opening: a damaged file is reported as such, and not by what its reader makes of it.
    held.check(progress)
    if isinstance(held, Index):
        held.open_files()
    else:
        EmbeddingStore.open(folder)
    return Summary(manifest.format, held.rows, held.dim, len(manifest.files), manifest.size)
