"""manifest.json: the contents of a folder, with size and sha256 of every file in it and of the manifest itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from index.files import InputError, atomic_path, read_json, sha256_file, sha256_files

NAME = "manifest.json"
VERSION = 1
EMBEDDINGS = "embedding store"
INDEX = "index"
CHECKPOINT = "checkpoint"
FORMATS = (EMBEDDINGS, INDEX, CHECKPOINT)

Level = Literal["size", "hash"]
T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """Size of a file in bytes and its sha256 in hexadecimal."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The entry of a file on disk."""
        return cls(path.stat().st_size, sha256_file(path))


def entries(folder: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    """The entries of files in `folder`, read from disk."""
    paths = [folder / name for name in names]
    sums = sha256_files(paths)
    return {path.name: FileEntry(path.stat().st_size, sum_) for path, sum_ in zip(paths, sums, strict=True)}


@dataclass(frozen=True)
class Manifest:
    """The manifest of `folder`: its format, the fields of that format, and its files by name."""

    folder: Path
    format: str
    fields: dict[str, Any]
    files: dict[str, FileEntry]

    @property
    def size(self) -> int:
        """Total size of its files in bytes."""
        return sum(entry.bytes for entry in self.files.values())

    def of(self, names: Sequence[str]) -> Manifest:
        """A copy that lists only the files `names`."""
        return replace(self, files={name: self.files[name] for name in names})

    def field(self, name: str, kind: type[T]) -> T:
        """The value of the field `name`.

        Raises:
            InputError: the field is missing or not of type `kind`.
        """
        value = self.fields.get(name)
        # In Python True is an int; in JSON it is not.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self.folder / NAME}: expected {kind.__name__} in '{name}', found {value!r:.60}")
        return value

    def count(self, name: str) -> int:
        """The value of the field `name`, an integer of 0 or more.

        Raises:
            InputError: the field is missing, has another type or is negative.
        """
        value = self.field(name, int)
        if value < 0:
            raise InputError(f"{self.folder / NAME}: expected a number of 0 or more in '{name}', found {value}")
        return value

    def texts(self, name: str) -> dict[str, str]:
        """The value of the field `name`, an object whose values are strings.

        Raises:
            InputError: the field is missing or has another type.
        """
        value = self.field(name, dict)
        if not all(isinstance(text, str) for text in value.values()):
            raise InputError(f"{self.folder / NAME}: expected an object of texts in '{name}', found {value!r:.60}")
        return value


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.folder`/manifest.json atomically. The files it lists must be complete on disk before."""
    with atomic_path(manifest.folder / NAME) as temporary:
        temporary.write_text(_render(manifest), encoding="utf-8")


def read_manifest(folder: Path, format: str | None = None) -> Manifest:
    """Read and check `folder`/manifest.json.

    Args:
        folder: folder of the manifest.
        format: the expected format; None accepts any.

    Raises:
        InputError: there is no manifest, it is damaged, has another format or a newer version, or it lists a file
            outside `folder`.
    """
    path = folder / NAME
    if not path.is_file():
        expected = _a(format) if format else "an embedding store or an index"
        raise InputError(f"{folder}: expected {expected}, found no {NAME} there")
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("format"), str):
        raise InputError(f"{path}: expected an object with a 'format', found {value!r:.60}")
    found, version = value["format"], value.get("version")
    if found not in FORMATS:
        raise InputError(f"{path}: expected 'format' {' or '.join(map(repr, FORMATS))}, found {found!r:.60}")
    if format is not None and format != found:
        raise InputError(f"{folder}: expected {_a(format)}, found {_a(found)}")
    if version != VERSION or isinstance(version, bool):
        raise InputError(f"{path}: expected version {VERSION} of the format, found {version!r:.60}")
    fields = {name: field for name, field in value.items() if name not in ("format", "version", "files", "sha256")}
    manifest = Manifest(folder, found, fields, _parse_files(path, value.get("files")))
    # Its own sha256 must match too: the manifest must be, byte for byte, what `write_manifest` would write.
    if not _is_rendered(manifest, path.read_bytes()):
        raise InputError(f"{path}: damaged: its text does not have the sha256 that it states")
    return manifest


def verify_files(manifest: Manifest, level: Level, progress: Callable[[int], None] | None = None) -> None:
    """Check that every file of the manifest exists and has the right size and, at level "hash", the right sha256.

    Args:
        manifest: lists the files.
        level: "size" or "hash".
        progress: called at level "hash" with the number of bytes just checked.

    Raises:
        InputError: a file is missing or damaged; the message names it.
        ValueError: `level` is unknown.
    """
    if level not in ("size", "hash"):
        raise ValueError(f"level: expected 'size' or 'hash', found {level!r}")
    for name, expected in manifest.files.items():
        path = manifest.folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing: expected a file of {expected.bytes} bytes")
        if path.stat().st_size != expected.bytes:
            raise InputError(f"{path}: damaged: expected {expected.bytes} bytes, found {path.stat().st_size}")
    if level == "hash":
        paths = [manifest.folder / name for name in manifest.files]
        with contextlib.closing(sha256_files(paths, progress)) as sums:
            for path, expected, found in zip(paths, manifest.files.values(), sums, strict=True):
                if found != expected.sha256:
                    raise InputError(f"{path}: damaged: expected sha256 {expected.sha256[:12]}…, found {found[:12]}…")


def _a(format: str) -> str:
    return f"{'an' if format[0] in 'aeiou' else 'a'} {format}"


def _parse_files(path: Path, value: object) -> dict[str, FileEntry]:
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object in 'files', found {value!r:.60}")
    files = {}
    for name, entry in value.items():
        # A path to another folder would make us read and trust files outside this one.
        if name in ("", ".", "..", NAME) or any(c in name for c in "/\\\0"):
            raise InputError(f"{path}: expected names of files in this folder, found {name!r:.60}")
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
            raise InputError(f"{path}: expected 'bytes' and 'sha256' for {name!r:.60}, found {entry!r:.60}")
        files[name] = FileEntry(entry["bytes"], entry["sha256"])
    return files


def _is_rendered(manifest: Manifest, data: bytes) -> bool:
    try:
        return _render(manifest).encode() == data
    except (ValueError, RecursionError):  # NaN, or nested too deeply
        return False


def _render(manifest: Manifest) -> str:
    files = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in manifest.files.items()}
    value = {"format": manifest.format, "version": VERSION, **manifest.fields, "files": files}
    checksum = hashlib.sha256(_dump(value).encode()).hexdigest()
    return _dump({**value, "sha256": checksum}) + "\n"


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
