"""Check that all ranks have the same settings, data, weights and checkpoints.

Commands that run on several ranks compare their settings when the process group is created (`context.joined_ranks`).
Later they compare what they have read, before it is used: training its configuration, model, data, dev set and
checkpoint (training/), encoding and evaluation the model and the corpus (encoding/corpus.py, evaluation/suite.py), an
index build its embeddings (index_build.py). Nothing is compared in each step.

The following may differ between ranks: the paths of inputs, whose contents are compared instead; the cache folder; the
number of data workers; the index of the GPU; and options for printing, since only rank 0 prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import secrets
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retriever.distributed.errors import AllRanksError

if TYPE_CHECKING:
    from retriever.config.run import TrainConfig
    from retriever.distributed.ranks import Ranks

# Maximum number of values, and of further fields, that a message lists.
MAX_LISTED = 4
# Fields of a configuration that may differ: paths, whose contents are compared, and settings that change no result.
MAY_DIFFER = (
    "out",
    "model.name",
    "model.tokenizer",
    "model.image.name",
    "data.sources[].path",
    "data.images[].path",
    "data.workers",
    "data.cache",
    "dev.path",
    "dev.paths",
    "device",
)
# Time in which a file that another machine has created becomes visible on a network file system.
VISIBILITY_SECONDS = 5.0


class RanksDifferError(AllRanksError):
    """Settings or inputs differ between ranks. Raised on all ranks with the same message."""


@dataclass(frozen=True)
class ContentHash:
    """A value that is compared by the hash of its content, whatever its location on each rank."""

    sha256: str
    """Hexadecimal hash of the content; empty if there is no content."""
    location: str = ""
    """Path or name, shown in messages."""

    @classmethod
    def of(cls, value: Any, location: str = "") -> ContentHash:
        """Hash a value that is serializable as JSON; other objects count as their `str`."""
        text = json.dumps(value, default=str, sort_keys=True)
        return cls(hashlib.sha256(text.encode()).hexdigest(), location)

    def __str__(self) -> str:
        found = f"sha256 {self.sha256[:12]}…" if self.sha256 else "none"
        return f"{self.location} ({found})" if self.location else found


def check_same_on_ranks(ranks: Ranks, fields: Mapping[str, Any]) -> None:
    """Check that the fields have the same values on all ranks. Every rank must call it.

    Args:
        ranks: the ranks. Nothing is compared without a process group.
        fields: names known to the user, with their values. A ContentHash is compared by its hash, any other value by
            its JSON. The message names the first field that differs.

    Raises:
        RanksDifferError: on every rank: "optim.lr differs between ranks: 2e-05 on rank 0, 3e-05 on rank 1".
    """
    if ranks.group is None:
        return
    compared = {name: _comparable(value) for name, value in fields.items()}
    if problem := describe_difference(ranks.all_gather(compared)):
        # If a rank exited before the others have its values, it would be reported as killed.
        with contextlib.suppress(RuntimeError):
            ranks.barrier()
        raise RanksDifferError(problem)


def check_same_folder(ranks: Ranks, name: str, folder: Path) -> None:
    """Check that `folder` is the same folder on all ranks. Every rank must call it.

    Rank 0 creates a temporary file in the folder, or in its nearest existing parent, and all ranks must see it:
    different paths may name the same folder, and the same path may name different folders on two machines.

    Args:
        ranks: the ranks. Nothing is compared without a process group.
        name: name of the setting, for the message.
        folder: an existing folder or one that will be created.

    Raises:
        RanksDifferError: on every rank.
    """
    if ranks.group is None:
        return
    resolved = folder.resolve()
    existing = next(path for path in (resolved, *resolved.parents) if path.exists())
    marker = existing / f".ranks-{secrets.token_hex(8)}"
    if ranks.is_first:
        # If the folder is not writable, only paths are compared.
        with contextlib.suppress(OSError):
            marker.touch(exist_ok=False)
    path, relative, host = str(resolved), str(resolved.relative_to(existing)), socket.gethostname()
    try:
        marker_name = marker.name if marker.exists() else None
        first = ranks.broadcast({"path": path, "relative": relative, "host": host, "marker": marker_name})
        if first["marker"] is None:
            same = first["path"] == path
        else:
            wait = first["host"] != host
            same = first["relative"] == relative and _becomes_visible(existing / first["marker"], wait=wait)
        suffix = "" if same or path != first["path"] else f", another folder on {host},"
        check_same_on_ranks(ranks, {name: _Described(same, f"{path}{suffix}")})
    finally:
        if ranks.is_first:
            with contextlib.suppress(OSError):
                marker.unlink()
    # The marker must be gone before any rank uses the folder.
    ranks.barrier()


def flat_settings(settings: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of a nested dataclass by names such as "optim.lr" and "data.sources[0].weight".

    Args:
        settings: the dataclass.
        without: names to leave out, with [] for any index: "data.sources[].path".
    """
    flat: dict[str, Any] = {}
    _flatten(dataclasses.asdict(settings), "", "", frozenset(without), flat)
    return flat


def compared_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a training run that must be the same on all ranks."""
    return flat_settings(config, MAY_DIFFER)


def describe_difference(fields_of_ranks: Sequence[Mapping[str, Sequence[str]]]) -> str:
    """Describe how the fields of the ranks differ, in one line; empty if they are equal.

    Args:
        fields_of_ranks: for each rank, name -> (value to compare, value to show).
    """
    names = list(dict.fromkeys(name for fields in fields_of_ranks for name in fields))
    differing = [name for name in names if len({_field(fields, name)[0] for fields in fields_of_ranks}) > 1]
    if not differing:
        return ""
    ranks_with: dict[str, list[int]] = {}
    for rank, fields in enumerate(fields_of_ranks):
        ranks_with.setdefault(_field(fields, differing[0])[0], []).append(rank)
    values = [
        f"{_field(fields_of_ranks[ranks[0]], differing[0])[1]} on {_format_ranks(ranks)}"
        for ranks in ranks_with.values()
    ]
    text = f"{differing[0]} differs between ranks: {', '.join(_limited(values))}"
    return text + (f" (so do {', '.join(_limited(differing[1:]))})" if differing[1:] else "")


@dataclass(frozen=True)
class _Described:
    """A value with the text that messages show for it."""

    value: Any
    text: str


def _comparable(value: Any) -> tuple[str, str]:
    """Return the value as compared and as shown in messages."""
    if isinstance(value, ContentHash):
        return value.sha256, str(value)
    if isinstance(value, _Described):
        return json.dumps(value.value), value.text
    text = json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
    return text, "none" if value is None else text.strip('"')


def _field(fields: Mapping[str, Sequence[str]], name: str) -> Sequence[str]:
    return fields.get(name, ("", "none"))


def _limited(texts: Sequence[str]) -> list[str]:
    """The first MAX_LISTED texts, and how many more there are."""
    more = len(texts) - MAX_LISTED
    return [*texts[:MAX_LISTED], *([f"and {more} more"] if more > 0 else [])]


def _format_ranks(ranks: Sequence[int]) -> str:
    """Format as "rank 3" or "ranks 0-2 and 5". Commas separate values in the message."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    if len(texts) > MAX_LISTED:
        texts = [*texts[:MAX_LISTED], "others"]
    return f"rank{'s' if len(ranks) > 1 else ''} {' and '.join(texts)}"


def _becomes_visible(file: Path, *, wait: bool) -> bool:
    """Whether the file exists, or appears within VISIBILITY_SECONDS if `wait`."""
    deadline = time.monotonic() + (VISIBILITY_SECONDS if wait else 0)
    while not file.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def _flatten(value: Any, name: str, pattern: str, without: frozenset[str], flat: dict[str, Any]) -> None:
    """Add the leaves of `value` to `flat`. `pattern` is `name` with [] for each index."""
    if pattern in without:
        return
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            dot = "." if name else ""
            _flatten(inner, f"{name}{dot}{key}", f"{pattern}{dot}{key}", without, flat)
    elif isinstance(value, list | tuple) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            _flatten(inner, f"{name}[{index}]", f"{pattern}[]", without, flat)
    else:
        flat[name] = value
