"""Random access to the samples of webdataset tars, with a memory-mapped index of the offsets of images and captions.

A sample consists of the members of one tar with the same name up to the first dot: KEY.jpg (or another image format)
with KEY.txt or KEY.json. Random access allows a random permutation of all samples in every epoch, without a shuffle
buffer, and resuming at any step. The disk must read at random positions as fast as sequentially.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from index.files import InputError, atomic_path, open_binary, read_at, read_json, write_json
from index.image_files.tars import member_name, split_name
from index.store.arrays import open_array
from retriever.data.images.tar_samples import COLUMNS, PARTS, scan_tar
from retriever.data.sources import Notices

VERSION = 3
"""Version of the index. Indexes of other versions are not used."""

# Shards of one source. The largest public datasets have some hundred thousand.
MAX_SHARDS = 1_000_000
MAX_BRACES = 16
# Open files per process; large datasets have tens of thousands of shards.
_MAX_OPEN_FILES = 256
COMPRESSED_TARS = (".tar.gz", ".tgz")
"""Endings of compressed tars, which are unpacked before they are indexed."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """Expand braces in a pattern: {000..012} is a range with leading zeros, {a,b} a list. There may be several.

    Raises:
        InputError: If the end of a range is below its start, or there are more than MAX_SHARDS names.
    """
    if pattern.count("{") > MAX_BRACES:
        raise InputError(f"{pattern:.200}: expected at most {MAX_BRACES} braces, found {pattern.count('{')}")
    names = 1
    for match in _BRACES.finditer(pattern):
        names *= _choices_count(pattern, match[1])
        if names > MAX_SHARDS:
            raise InputError(f"{pattern:.200}: expected at most {MAX_SHARDS:,} shards, found more")
    return _expand(pattern)


def _choices_count(pattern: str, content: str) -> int:
    if not (bounds := _RANGE.fullmatch(content)):
        return content.count(",") + 1
    if max(map(len, bounds.groups())) > 18:
        raise InputError(f"{pattern:.200}: expected at most {MAX_SHARDS:,} shards, found more")
    first, last = int(bounds[1]), int(bounds[2])
    if first > last:
        raise InputError(f"{pattern}: expected an ascending range, found {{{content}}}")
    return last - first + 1


def _expand(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    content = match[1]
    if bounds := _RANGE.fullmatch(content):
        width = len(bounds[1])
        choices = [f"{number:0{width}}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        choices = content.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for choice in choices for name in _expand(before + choice + after)]


class ShardedSamples:
    """The samples of many tars, by row. Picklable; worker processes open the files themselves.

    Attributes:
        shards: The tars.
        sha256: Checksum of all offsets and sizes and the names of the tars; it does not depend on their folder.
        parts: For "txt" and "json": whether any sample has such a member.
        notices: One line for each kind of sample that was skipped.
        skipped: Number of samples that were skipped.
    """

    def __init__(self, path: Path) -> None:
        """Open an index that `index_shards` wrote.

        Raises:
            InputError: If the index is missing or damaged.
        """
        self.path = path
        metadata = read_json(path.with_suffix(".json"))
        try:
            self.shards = [Path(shard["path"]) for shard in metadata["shards"]]
            self.sha256, self.parts = metadata["sha256"], metadata["parts"]
            self.notices, self.skipped = metadata["notices"], metadata["left_out"]
        except (LookupError, TypeError):
            raise InputError(f"{path.with_suffix('.json')}: damaged; remove it to index the tars again") from None
        # Columns: shard, then offset and size of image, txt and json, and the position of the image's header. The size
        # of a missing part is -1.
        self._rows = open_array(path)
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def shard(self, row: int) -> Path:
        """Return the tar of a sample."""
        return self.shards[self._rows[row][0]]

    def key(self, row: int) -> str:
        """Return the key of a sample, its path in the tar without extensions. It is read from the tar."""
        return split_name(member_name(self.shard(row), int(self._rows[row][COLUMNS])))[0]

    def location(self, row: int) -> str:
        """Return the tar and the key of a sample, for messages."""
        return f"{self.shard(row)}: {self.key(row)}"

    def read(self, row: int, part: str) -> bytes | None:
        """Return a member of a sample, or None if the sample does not have it.

        Args:
            row: The sample.
            part: "image", "txt" or "json".

        Raises:
            InputError: If the tar was truncated after it was indexed.
        """
        entry = self._rows[row]
        column = 1 + 2 * PARTS.index(part)
        shard, offset, size = int(entry[0]), int(entry[column]), int(entry[column + 1])
        if size < 0:
            return None
        content = read_at(self._descriptor(shard), size, offset)
        if len(content) != size:
            raise InputError(f"{self.shards[shard]}: expected {size} bytes at {offset}, found {len(content)}")
        return content

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = open_binary(self.shards[shard])
            if len(self._open) > _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # An argument, because the module may have been cleared when the interpreter exits.
        for descriptor in getattr(self, "_open", {}).values():
            close(descriptor)

    def __reduce__(self) -> tuple[type[ShardedSamples], tuple[Path]]:
        return ShardedSamples, (self.path,)


def index_shards(
    path: str,
    shards: Sequence[Path],
    cache: Path,
    *,
    captions: bool = True,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ShardedSamples:
    """Index tars into the folder `cache`, unless the index is there already. Each tar's index is cached as well.

    Samples without an image, or with neither txt nor json, are skipped and counted. Empty members count as missing.

    Args:
        path: Name of the source in messages.
        shards: The tars.
        captions: Whether samples without a caption are skipped. Default: True.
        cache: Folder for the index.
        workers: Number of processes. Only headers are read, about 20,000 per second and process. Default: 0, the
            calling process.
        progress: Called with the number of tars done since the last call.

    Raises:
        InputError: If a tar is missing, compressed or truncated, or there is no sample at all.
    """
    stats = [shard.stat() for shard in shards]
    # The key of an index with captions is that of earlier versions of this function.
    other: dict[str, Any] = {} if captions else {"captions": False}
    identities: list[dict[str, Any]] = [
        {"path": str(shard.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, **other}
        for shard, stat in zip(shards, stats, strict=True)
    ]
    merged = cache / f"{_key(identities)}.npy"
    if not (merged.exists() and merged.with_suffix(".json").exists()):
        indexes = [cache / "shards" / f"{_key(identity)}.npy" for identity in identities]
        jobs = [_Job(shard, index, captions) for shard, index in zip(shards, indexes, strict=True)]
        _merge(path, jobs, identities, merged, workers, progress)
    return ShardedSamples(merged)


@dataclass(frozen=True)
class _Job:
    """A tar, the file of its index, and whether samples need captions."""

    shard: Path
    index: Path
    captions: bool


def _key(identity: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, identity], sort_keys=True).encode()).hexdigest()[:24]


def _merge(
    path: str,
    jobs: Sequence[_Job],
    identities: list[dict[str, Any]],
    merged: Path,
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Merge the indexes of all tars into the file `merged`."""
    notices = Notices()
    tables = []
    for number, (rows, skipped) in enumerate(_index_all(jobs, workers)):
        for kind, location in skipped:
            notices.add(kind, location)
        tables.append(np.concatenate([np.full((len(rows), 1), number), rows], axis=1))
        if progress is not None:
            progress(1)
    rows = np.concatenate(tables)
    if not len(rows):
        caption = " with KEY.txt or KEY.json" if jobs[0].captions else ""
        lines = [f"{path}: expected samples of KEY.jpg (png, webp, …){caption}, found none"]
        raise InputError("; ".join(lines + notices.lines()))
    merged.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(merged) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
    digest = hashlib.sha256(_sha256(rows[:, :COLUMNS]).encode())
    digest.update(json.dumps([[Path(shard["path"]).name, shard["bytes"]] for shard in identities]).encode())
    metadata = {
        "sha256": digest.hexdigest(),
        "notices": notices.lines(),
        "left_out": notices.count("samples left out"),
        "parts": {part: bool((rows[:, 2 + 2 * number] >= 0).any()) for number, part in enumerate(PARTS)},
        "shards": identities,
    }
    # Written last; if it exists, the index is complete.
    write_json(merged.with_suffix(".json"), metadata)


def _sha256(rows: np.ndarray) -> str:
    """Return the sha256 of an array's npy file. The positions of headers are left out, as earlier versions did."""
    digest = hashlib.sha256()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": rows.shape})
    digest.update(header.getvalue())
    for start in range(0, len(rows), 2**16):
        digest.update(rows[start : start + 2**16].tobytes())
    return digest.hexdigest()


def _index_all(jobs: Sequence[_Job], workers: int) -> Iterator[tuple[np.ndarray, list[tuple[str, str]]]]:
    if workers > 1 and len(jobs) > 1:
        # Spawned, because the parent process may have threads.
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
            yield from pool.map(_index_one, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))
    else:
        yield from map(_index_one, jobs)


def _index_one(job: _Job) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return rows [samples, 7] and skipped samples of a tar, from its index, which is created if necessary."""
    index = job.index
    if not (index.exists() and index.with_suffix(".json").exists()):
        rows, skipped = scan_tar(job.shard, job.captions)
        index.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(index) as temporary, open(temporary, "wb") as file:
            np.save(file, rows)
        write_json(index.with_suffix(".json"), {"left_out": skipped})
    skipped = [(kind, location) for kind, location in read_json(index.with_suffix(".json"))["left_out"]]
    return np.array(open_array(index)), skipped
