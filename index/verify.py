"""Checking every byte of an embedding store or index."""

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
    """What a verified folder contains: format, rows, dimensions, number of files, and size in bytes."""

    format: str
    rows: int
    dim: int
    files: int
    bytes: int


def verify(folder: Path, progress: Callable[[int], None] | None = None) -> Summary:
    """Check every byte of the embedding store or index in `folder` against its manifest.

    Args:
        folder: folder of the store or index.
        progress: called with the number of bytes just checked.

    Returns:
        What the folder contains.

    Raises:
        InputError: a file is missing or damaged (the message names it), or the folder contains neither.
    """
    manifest = read_manifest(folder)
    target: EmbeddingStore | Index
    if manifest.format == EMBEDDINGS:
        target = EmbeddingStore(manifest)
    elif manifest.format == INDEX:
        # Memory-mapped, so that an index larger than memory can be verified.
        target = Index(manifest, mmap=True)
    else:
        raise InputError(f"{folder}: expected an embedding store or an index, found a {manifest.format}")
    # Before opening, so that a damaged file is reported by its checksum and not by an error of its reader.
    target.check(progress)
    if isinstance(target, Index):
        target.open_files()
    else:
        EmbeddingStore.open(folder)
    return Summary(manifest.format, target.rows, target.dim, len(manifest.files), manifest.size)
