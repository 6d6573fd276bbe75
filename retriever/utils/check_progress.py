"""A bar for the bytes of stores and indexes that are checked against their sums."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from index.manifest import NAME, read_manifest
from index.progress import Reporter

MIB = 2**20


@contextlib.contextmanager
def checksum_progress(
    reporter: Reporter, folders: Sequence[Path], names: Sequence[str] | None = None
) -> Iterator[Callable[[int], None]]:
    """`checking_bytes` for the files of stores and indexes.

    Args:
        reporter: where the bar is drawn.
        folders: stores and indexes; one that is not there has no bytes.
        names: of the files that are checked; all of them when left out.

    Raises:
        InputError: a manifest is damaged.
    """
    manifests = [read_manifest(folder) for folder in folders if (folder / NAME).is_file()]
    if names is not None:
        manifests = [manifest.of([name for name in names if name in manifest.files]) for manifest in manifests]
    what = folders[0].name if len(folders) == 1 else f"{len(folders)} folders"
    with byte_progress(reporter, what, sum(manifest.size for manifest in manifests)) as checked:
        yield checked


@contextlib.contextmanager
def byte_progress(reporter: Reporter, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield what is called with the number of bytes just checked, of `total`.

    The bar is there from the first of them to the last.
    """
    done = 0
    advance: Callable[..., None] | None = None
    with contextlib.ExitStack() as shown:

        def checked(count: int) -> None:
            nonlocal advance, done
            if advance is None:
                advance = shown.enter_context(reporter.bar(f"check {what}", total // MIB, "MiB"))
            before, done = done, done + count
            advance(done // MIB - before // MIB)
            if done >= total:
                shown.close()

        yield checked
