"""Progress bars for checking the checksums of stores and indexes."""

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
    """Context with a progress bar over the bytes of stores and indexes.

    Args:
        reporter: shows the bar.
        folders: stores and indexes. A folder that does not exist counts 0 bytes.
        names: names of the files to check. Default: all files of the manifests.

    Yields:
        A function to call with the number of bytes that were just checked.

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
    """Context with a progress bar over `total` bytes, shown in MiB from the first call until all bytes are checked.

    Yields:
        A function to call with the number of bytes that were just checked.
    """
    done = 0
    advance: Callable[..., None] | None = None
    with contextlib.ExitStack() as bar:

        def checked(count: int) -> None:
            nonlocal advance, done
            if advance is None:
                advance = bar.enter_context(reporter.bar(f"check {what}", total // MIB, "MiB"))
            before, done = done, done + count
            advance(done // MIB - before // MIB)
            if done >= total:
                bar.close()

        yield checked
