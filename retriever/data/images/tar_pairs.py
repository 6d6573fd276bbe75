"""Pairs of webdataset tars."""

from __future__ import annotations

from typing import Any

import numpy as np

from index.files import InputError, parse_json
from retriever.config.images import ImageSource
from retriever.data.images.pairs import BrokenPairError, RawPair, usable_captions
from retriever.data.images.tars import ShardedSamples

# Samples in which a key is looked for when the source is opened.
CHECKED_SAMPLES = 64


class TarPairs:
    """The pairs of webdataset tars."""

    def __init__(self, source: ImageSource, samples: ShardedSamples) -> None:
        """Create the source.

        Args:
            source: `source.caption` names the members with captions: "txt", one caption per line, or "json:KEY", a text
                or a list of texts. Default: txt if there are such members, otherwise json:caption.
            samples: The samples of the tars.

        Raises:
            InputError: If `source.caption` is invalid, no sample has such a member, or none of the samples that are
                looked at has the key.
        """
        self.source, self.samples = source, samples
        self.name, self.notices, self.sha256 = source.path, samples.notices, samples.sha256
        self.skipped = samples.skipped
        self.captions = source.caption or (("txt",) if samples.parts["txt"] else ("json:caption",))
        for caption in self.captions:
            part, _, key = caption.partition(":")
            if (part, bool(key)) not in (("txt", False), ("json", True)):
                raise InputError(f"{source.path}: caption: expected txt or json:KEY, found {caption!r}")
            if not samples.parts[part]:
                raise InputError(f"{source.path}: caption: expected members .{part}, found none in any sample")
            if key:
                self._check_key(key)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row."""
        content = self.samples.read(row, "image") if with_image else b""
        assert content is not None
        captions = [text for caption in self.captions for text in self._texts(row, caption)]
        return RawPair(content, usable_captions(captions, self, row), f"{self.sha256} {row}", self, row)

    def location(self, row: int) -> str:
        """Return the tar and the key of a pair."""
        return self.samples.location(row)

    def images_sha256(self) -> str:
        """Return the sha256 of the tars."""
        return self.sha256

    def _check_key(self, key: str) -> None:
        """Check that one of some evenly spaced samples has a key in its JSON."""
        keys: set[str] = set()
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), CHECKED_SAMPLES)).astype(int)).tolist()
        for row in rows:
            content = self.samples.read(row, "json")
            try:
                found = {} if content is None else self._metadata(row, content.decode("utf-8-sig", "replace"))
            except BrokenPairError:
                # Counted when it is read.
                continue
            if key in found:
                return
            keys |= found.keys()
        if keys:
            shown = ", ".join(sorted(keys)[:20])
            raise InputError(
                f"{self.name}: caption: expected the key {key!r} in .json, found {shown} in {len(rows)} samples"
            )

    def _texts(self, row: int, caption: str) -> list[Any]:
        part, _, key = caption.partition(":")
        content = self.samples.read(row, part)
        if content is None:
            return []
        try:
            # A byte order mark is not part of a caption.
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BrokenPairError(f"{self.location(row)}: expected UTF-8 in .{part}") from None
        if part == "txt":
            return text.splitlines()
        value = self._metadata(row, text).get(key)
        return value if isinstance(value, list) else [value]

    def _metadata(self, row: int, text: str) -> dict[str, Any]:
        try:
            metadata = parse_json(text, ".json")
        except InputError as error:
            # The name is read from the tar, which would take time for every pair.
            raise BrokenPairError(f"{self.location(row)}: {error}") from None
        if not isinstance(metadata, dict):
            raise BrokenPairError(f"{self.location(row)}: expected a JSON object in .json, found {text!r:.60}")
        return metadata
