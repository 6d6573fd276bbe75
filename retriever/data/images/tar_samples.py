"""Grouping the members of a tar to samples, and counting the samples that are lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from index.image_files.folders import IMAGE_EXTENSIONS, is_hidden
from index.image_files.tars import TarMember, tar_members

MAX_CAPTION_BYTES = 2**24

PARTS = ("image", "txt", "json")
# Columns of an index of one tar: offset and size of each part, and the position of the image's header.
COLUMNS = 2 * len(PARTS) + 1


@dataclass
class _Sample:
    """The members of a tar with one key."""

    members: dict[str, TarMember] = field(default_factory=dict)
    """Extension -> first readable member of an image or a caption."""
    counts: Counter[str] = field(default_factory=Counter)
    """Extension -> number of members of an image or a caption."""
    dotted: dict[str, set[str]] = field(default_factory=dict)
    """For names with further dots: part of the name between the first and the last dot -> parts."""
    is_faulty: bool = False

    def add(self, member: TarMember) -> None:
        """Add a member."""
        inner, _, extension = member.extension.rpartition(".")
        part = _part(extension)
        if part is None:
            return
        if inner:
            self.dotted.setdefault(inner, set()).add(part)
            return
        self.counts[extension] += 1
        if member.fault or (part != "image" and member.size > MAX_CAPTION_BYTES):
            self.is_faulty = True
        elif member.size:
            self.members.setdefault(extension, member)

    def parts(self) -> dict[str, TarMember]:
        """The member of each part. Of images in several formats it is the first of IMAGE_EXTENSIONS."""
        order = [extension for extension in (*IMAGE_EXTENSIONS, "txt", "json") if extension in self.members]
        return {_part(extension) or "": self.members[extension] for extension in reversed(order)}

    def lost(self, key: str, captions: bool) -> Iterator[tuple[str, str]]:
        """Yield the reason and the name of each sample with this key that is left out."""
        complete = is_complete(self.parts(), captions)
        dotted = [name for name, p in self.dotted.items() if "image" in p and (len(p) > 1 or not complete)]
        for name in dotted:
            yield "samples left out because their name has a dot before the extension", f"{key}.{name}"
        for _ in range(max(self.counts.values(), default=1) - 1):
            yield "samples left out because an earlier one of the tar has the same key", key
        if complete or dotted:
            return
        if self.is_faulty:
            yield "samples left out with a sparse, huge or truncated member", key
        else:
            yield f"samples left out without {'a caption' if 'image' in self.parts() else 'an image'}", key


def is_complete(parts: Collection[str], captions: bool) -> bool:
    """Whether there is an image, and a caption if it is needed."""
    return "image" in parts and (len(parts) > 1 or not captions)


def _part(extension: str) -> str | None:
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return extension if extension in PARTS else None


def scan_tar(shard: Path, captions: bool) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Read the headers of a tar: rows [samples, 7] of offsets and sizes, and (kind, location) of skipped samples."""
    samples: dict[str, _Sample] = {}
    skipped: list[tuple[str, str]] = []
    for member in tar_members(shard):
        if not is_hidden(member.name):
            samples.setdefault(member.key, _Sample()).add(member)
        elif member.extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            skipped.append(("hidden images ignored", f"{shard}: {member.name}"))
    rows = []
    for key, sample in samples.items():
        skipped += [(reason, f"{shard}: {name}") for reason, name in sample.lost(key, captions)]
        if is_complete(parts := sample.parts(), captions):
            spans = [(parts[part].offset, parts[part].size) if part in parts else (0, -1) for part in PARTS]
            rows.append([*(number for span in spans for number in span), parts["image"].header])
    return np.array(rows, dtype=np.int64).reshape(-1, COLUMNS), skipped
