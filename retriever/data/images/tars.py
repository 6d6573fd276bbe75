"""webdataset tars by row: an index of where each picture and its captions lie, built once and memory-mapped.

A sample is the members of one tar that share a name up to its first dot: KEY.jpg (jpeg, png, webp) with KEY.txt or
KEY.json. Reading goes by offset, so an epoch is a random permutation of all samples rather than of what a buffer holds,
and a run resumes at any step by its number alone. It wants a disk that reads at random as fast as in order.
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
from retriever.data.sources import Notices

PICTURES = ("jpg", "jpeg", "png", "webp")
VERSION = 2
"""Raised when the index changes, so that one of an older form is not taken for it."""

# Open files a process; a large set has tens of thousands of shards.
_MOST_OPEN = 256
_PARTS = ("picture", "txt", "json")
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for: {000..012} counts, with leading zeros; {a,b} lists; several multiply.

    Raises:
        InputError: a range that does not rise.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    inner = found[1]
    if counted := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = counted[1], counted[2]
        if int(first) > int(last):
            raise InputError(f"{pattern}: expected a range that rises, found {{{inner}}}")
        names = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        names = inner.split(",")
    return [full for name in names for full in expand_braces(pattern[: found.start()] + name + pattern[found.end() :])]


def shard_paths(path: str) -> list[Path]:
    """The tars that a pattern or a folder names, in order.

    Raises:
        InputError: one is not there, or the folder holds none.
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
    """The samples of many tars, by row; picklable, so that worker processes open their own files.

    Attributes:
        shards: the tars.
        sha256: of all offsets and sizes with the shards' names: equal for equal tars, wherever they lie.
        notices: one line for each kind of sample that was left out.
        left_out: how many samples were.
    """

    def __init__(self, path: Path) -> None:
        """Open an index that `index_shards` wrote.

        Raises:
            InputError: it is missing or damaged.
        """
        self.path = path
        about = read_json(path.with_suffix(".json"))
        self.shards = [Path(shard["path"]) for shard in about["shards"]]
        self.sha256, self.parts = about["sha256"], about["parts"]
        self.notices, self.left_out = about["notices"], about["left_out"]
        # Per row: the shard, then offset and size of picture, txt and json; size -1 for a part that is not there.
        self._rows = np.load(path, mmap_mode="r")
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, row: int) -> str:
        """Where a sample lies, for messages."""
        found = self._rows[row]
        return f"{self.shards[found[0]]}: picture at byte {found[1]}"

    def read(self, row: int, part: str) -> bytes | None:
        """The picture, txt or json of a sample; none where it has none.

        Raises:
            InputError: the tar has been cut short since it was indexed.
        """
        found = self._rows[row]
        number = 1 + 2 * _PARTS.index(part)
        shard, offset, size = int(found[0]), int(found[number]), int(found[number + 1])
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
            if len(self._open) > _MOST_OPEN:
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
    """Index tars into the folder `cache`, unless that was done before; each shard's part is kept as it is made.

    Samples without a picture, or with neither txt nor json, are left out and counted, and empty members taken for
    missing ones.

    Args:
        workers: processes; headers alone are read, some 20,000 a second and process.
        progress: called with the number of shards done since the last call.

    Raises:
        InputError: a tar is missing, compressed or cut short, or there is no sample at all.
    """
    shards = shard_paths(path)
    stats = [shard.stat() for shard in shards]
    about: list[dict[str, Any]] = [
        {"path": str(shard.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        for shard, stat in zip(shards, stats, strict=True)
    ]
    merged = cache / f"{_key(about)}.npy"
    if not (merged.exists() and merged.with_suffix(".json").exists()):
        parts = [(shard, cache / "shards" / f"{_key(one)}.npy") for shard, one in zip(shards, about, strict=True)]
        _merge(path, parts, about, merged, workers, progress)
    return ShardedSamples(merged)


def _key(about: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, about], sort_keys=True).encode()).hexdigest()[:24]


def _merge(
    path: str,
    parts: Sequence[tuple[Path, Path]],
    about: list[dict[str, Any]],
    merged: Path,
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    notices = Notices()
    tables = []
    for number, (rows, left_out) in enumerate(_indexed(parts, workers)):
        for what, place in left_out:
            notices.add(what, place)
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
    digest.update(json.dumps([[Path(one["path"]).name, one["bytes"]] for one in about]).encode())
    has = {part: bool((rows[:, 2 + 2 * number] >= 0).any()) for number, part in enumerate(_PARTS)}
    facts = {
        "sha256": digest.hexdigest(),
        "notices": notices.lines(),
        "left_out": notices.count("samples left out"),
        "parts": has,
        "shards": about,
    }
    # Written last: where it stands, the index is whole.
    write_json(merged.with_suffix(".json"), facts)


def _indexed(parts: Sequence[tuple[Path, Path]], workers: int) -> Iterator[tuple[np.ndarray, list[tuple[str, str]]]]:
    if workers > 1 and len(parts) > 1:
        # Not forked: the parent may have threads.
        with ProcessPoolExecutor(min(workers, len(parts)), mp_context=get_context("spawn")) as pool:
            yield from pool.map(_index_one, parts, chunksize=max(1, min(16, len(parts) // (4 * workers))))
    else:
        yield from map(_index_one, parts)


def _index_one(part: tuple[Path, Path]) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Rows [samples, 6] of one shard, and what was left out; from its part of the cache where that is there."""
    shard, kept = part
    if not (kept.exists() and kept.with_suffix(".json").exists()):
        rows, left_out = _scan(shard)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as temporary, open(temporary, "wb") as file:
            np.save(file, rows)
        write_json(kept.with_suffix(".json"), {"left_out": left_out})
    left_out = [(what, place) for what, place in read_json(kept.with_suffix(".json"))["left_out"]]
    return np.load(kept), left_out


def _scan(shard: Path) -> tuple[np.ndarray, list[tuple[str, str]]]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                # What is read is where its header says; members are not kept, which tarfile would.
                tar.members = []  # type: ignore[attr-defined]
                folder, _, name = member.name.rpartition("/")
                if member.isreg() and not name.startswith((".", "__")):
                    key, _, extension = name.partition(".")
                    extension = extension.lower()
                    part = "picture" if extension in PICTURES else extension
                    if part in _PARTS and member.size:
                        samples.setdefault(f"{folder}/{key}", {}).setdefault(part, (member.offset_data, member.size))
                    else:
                        samples.setdefault(f"{folder}/{key}", {})
    except tarfile.TarError as error:
        raise InputError(f"{shard}: expected an uncompressed tar, found one that cannot be read: {error}") from None
    rows, left_out = [], []
    for key, found in samples.items():
        place = f"{shard}: {key.lstrip('/')}"
        if "picture" not in found:
            left_out.append(("samples left out for want of a picture", place))
        elif len(found) == 1:
            left_out.append(("samples left out for want of a caption", place))
        else:
            rows.append([number for part in _PARTS for number in found.get(part, (0, -1))])
    return np.array(rows, dtype=np.int64).reshape(-1, 6), left_out
