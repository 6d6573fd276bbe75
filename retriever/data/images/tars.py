"""Random access to the samples of webdataset tars, with a memory-mapped index of the offsets of images and captions.

A sample consists of the members of one tar with the same name up to the first dot: KEY.jpg (or jpeg, png, webp) with
KEY.txt or KEY.json. Random access allows a random permutation of all samples in every epoch, without a shuffle buffer,
and resuming at any step. The disk must read at random positions as fast as sequentially.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from index.files import InputError, atomic_path, read_json, sha256_file, write_json
from index.image_files import MAX_FILE_BYTES
from retriever.data.sources import Notices

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VERSION = 2
"""Version of the index. Indexes of other versions are not used."""

# Shards of one source. The largest public data sets have some hundred thousand.
MAX_SHARDS = 1_000_000
MAX_BRACES = 16
# Open files per process; large datasets have tens of thousands of shards.
_MAX_OPEN_FILES = 256
_PARTS = ("image", "txt", "json")
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


def shard_paths(path: str) -> list[Path]:
    """Return the tars of a folder (sorted) or of a pattern with braces (in its order).

    Raises:
        InputError: If a tar does not exist, or the folder has none.
    """
    folder = Path(path)
    shards = sorted(folder.glob("*.tar")) if folder.is_dir() else [Path(name) for name in expand_braces(path)]
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{shard}: no such file" + (f" (of {path})" if str(shard) != path else ""))
    if not shards:
        raise InputError(f"{path}: expected .tar files, found none")
    return shards


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
        self.shards = [Path(shard["path"]) for shard in metadata["shards"]]
        self.sha256, self.parts = metadata["sha256"], metadata["parts"]
        self.notices, self.skipped = metadata["notices"], metadata["left_out"]
        # Columns: shard, then offset and size of image, txt and json. The size of a missing part is -1.
        self._rows = np.load(path, mmap_mode="r")
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def location(self, row: int) -> str:
        """Return the tar and the offset of a sample, for messages."""
        entry = self._rows[row]
        return f"{self.shards[entry[0]]}: image at byte {entry[1]}"

    def read(self, row: int, part: str) -> bytes | None:
        """Return a member of a sample, or None if the sample does not have it.

        Args:
            row: The sample.
            part: "image", "txt" or "json".

        Raises:
            InputError: If the tar was truncated after it was indexed.
        """
        entry = self._rows[row]
        column = 1 + 2 * _PARTS.index(part)
        shard, offset, size = int(entry[0]), int(entry[column]), int(entry[column + 1])
        if size < 0:
            return None
        content = os.pread(self._descriptor(shard), size, offset)
        if len(content) != size:
            raise InputError(f"{self.shards[shard]}: expected {size} bytes at {offset}, found {len(content)}")
        return content

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY)
            if len(self._open) > _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def __reduce__(self) -> tuple[type[ShardedSamples], tuple[Path]]:
        return ShardedSamples, (self.path,)


def index_shards(
    path: str, cache: Path, *, workers: int = 0, progress: Callable[[int], None] | None = None
) -> ShardedSamples:
    """Index tars into the folder `cache`, unless the index is there already. Each tar's index is cached as well.

    Samples without an image, or with neither txt nor json, are skipped and counted. Empty members count as missing.

    Args:
        path: A folder or a pattern with braces.
        cache: Folder for the index.
        workers: Number of processes. Only headers are read, about 20,000 per second and process. Default: 0, the
            calling process.
        progress: Called with the number of tars done since the last call.

    Raises:
        InputError: If a tar is missing, compressed or truncated, or there is no sample at all.
    """
    shards = shard_paths(path)
    stats = [shard.stat() for shard in shards]
    identities: list[dict[str, Any]] = [
        {"path": str(shard.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        for shard, stat in zip(shards, stats, strict=True)
    ]
    merged = cache / f"{_key(identities)}.npy"
    if not (merged.exists() and merged.with_suffix(".json").exists()):
        indexes = [cache / "shards" / f"{_key(identity)}.npy" for identity in identities]
        _merge(path, list(zip(shards, indexes, strict=True)), identities, merged, workers, progress)
    return ShardedSamples(merged)


def _key(identity: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, identity], sort_keys=True).encode()).hexdigest()[:24]


def _merge(
    path: str,
    shards: Sequence[tuple[Path, Path]],
    identities: list[dict[str, Any]],
    merged: Path,
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Merge the indexes of all `shards`, pairs of a tar and its index, into the file `merged`."""
    notices = Notices()
    tables = []
    for number, (rows, skipped) in enumerate(_index_all(shards, workers)):
        for kind, location in skipped:
            notices.add(kind, location)
        tables.append(np.concatenate([np.full((len(rows), 1), number), rows], axis=1))
        if progress is not None:
            progress(1)
    rows = np.concatenate(tables)
    if not len(rows):
        lines = [f"{path}: expected samples of KEY.jpg (png, webp) with KEY.txt or KEY.json, found none"]
        raise InputError("; ".join(lines + notices.lines()))
    merged.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(merged) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
    digest = hashlib.sha256(sha256_file(merged).encode())
    digest.update(json.dumps([[Path(shard["path"]).name, shard["bytes"]] for shard in identities]).encode())
    metadata = {
        "sha256": digest.hexdigest(),
        "notices": notices.lines(),
        "left_out": notices.count("samples left out"),
        "parts": {part: bool((rows[:, 2 + 2 * number] >= 0).any()) for number, part in enumerate(_PARTS)},
        "shards": identities,
    }
    # Written last; if it exists, the index is complete.
    write_json(merged.with_suffix(".json"), metadata)


def _index_all(shards: Sequence[tuple[Path, Path]], workers: int) -> Iterator[tuple[np.ndarray, list[tuple[str, str]]]]:
    if workers > 1 and len(shards) > 1:
        # Spawned, because the parent process may have threads.
        with ProcessPoolExecutor(min(workers, len(shards)), mp_context=get_context("spawn")) as pool:
            yield from pool.map(_index_one, shards, chunksize=max(1, min(16, len(shards) // (4 * workers))))
    else:
        yield from map(_index_one, shards)


def _index_one(shard: tuple[Path, Path]) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return rows [samples, 6] and skipped samples of a tar, from its index, which is created if necessary."""
    tar, index = shard
    if not (index.exists() and index.with_suffix(".json").exists()):
        rows, skipped = _scan(tar)
        index.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(index) as temporary, open(temporary, "wb") as file:
            np.save(file, rows)
        write_json(index.with_suffix(".json"), {"left_out": skipped})
    skipped = [(kind, location) for kind, location in read_json(index.with_suffix(".json"))["left_out"]]
    return np.load(index), skipped


def _scan(shard: Path) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Read the headers of a tar: rows [samples, 6] of offsets and sizes, and (kind, location) of skipped samples."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    damaged: set[str] = set()
    bytes_ = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            position = -1
            for member in tar:
                # tarfile would keep all members in memory.
                tar.members = []  # type: ignore[attr-defined]
                folder, _, name = member.name.rpartition("/")
                if member.isreg() and not name.startswith((".", "__")):
                    key, _, extension = name.partition(".")
                    extension = extension.lower()
                    part = "image" if extension in IMAGE_EXTENSIONS else extension
                    parts = samples.setdefault(f"{folder}/{key}", {})
                    # The content of a sparse member is not stored as it is.
                    if member.issparse() or not 0 <= member.size <= min(bytes_ - member.offset_data, MAX_FILE_BYTES):
                        damaged.add(f"{folder}/{key}")
                    elif part in _PARTS and member.size:
                        parts.setdefault(part, (member.offset_data, member.size))
                # Members follow each other; a header that leads back would be read for ever.
                if tar.offset <= position:
                    raise tarfile.ReadError(f"the member {member.name!r:.60} has the size {member.size}")
                position = tar.offset
    except (tarfile.TarError, ValueError, ArithmeticError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{shard}: expected an uncompressed tar, found one that cannot be read: {reason:.200}"
        ) from None
    rows, skipped = [], []
    for key, parts in samples.items():
        location = f"{shard}: {key.lstrip('/')}"
        if key in damaged:
            skipped.append(("samples left out with a sparse, huge or truncated member", location))
        elif "image" not in parts:
            skipped.append(("samples left out without an image", location))
        elif len(parts) == 1:
            skipped.append(("samples left out without a caption", location))
        else:
            rows.append([number for part in _PARTS for number in parts.get(part, (0, -1))])
    return np.array(rows, dtype=np.int64).reshape(-1, 6), skipped
