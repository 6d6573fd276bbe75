"""Whether the processes of a job are about to do the same: their settings, data, weights and checkpoints compared.

Every command that shares its work among ranks compares its settings when the ranks have met (`ranks.joined_ranks`), and
what it has read before it is used: a run its configuration, model, data, dev set and checkpoint (trainer.py), encoding
and evaluation the model and the corpus (encoding/corpus.py, evaluation/suite.py), an index its embeddings
(index_build.py). Nothing is compared from step to step.

What may differ: paths of what is read, whose contents are compared instead; the cache; numbers of data workers; the
number of a GPU, but not whether it is one; and how the first rank, which alone answers, prints the answer.
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

# Of the values of one field, and of the other fields, that a message names.
MOST_NAMED = 4
# Of a run's configuration: where things lie, whose contents are compared, and what changes no result.
OF_ONE_RANK = (
    "out",
    "model.name",
    "model.tokenizer",
    "model.image.name",
    "data.sources[].path",
    "data.images[].path",
    "data.workers",
    "data.cache",
    "dev.path",
    "device",
)
# Until a file that another machine has made is to be seen on a network disk.
SECONDS = 5.0


class RanksDifferError(AllRanksError):
    """Ranks of a job would not do the same; raised on all of them, with one message."""


@dataclass(frozen=True)
class ContentHash:
    """What is compared by a digest of its content, wherever it lies on each rank."""

    digest: str
    """Of the content; empty where there is none."""
    place: str = ""
    """For messages."""

    @classmethod
    def of(cls, value: Any, place: str = "") -> ContentHash:
        """That of anything that JSON can say."""
        text = json.dumps(value, default=str, sort_keys=True)
        return cls(hashlib.sha256(text.encode()).hexdigest(), place)

    def __str__(self) -> str:
        found = f"sha256 {self.digest[:12]}…" if self.digest else "none"
        return f"{self.place} ({found})" if self.place else found


def check_same_on_ranks(ranks: Ranks, fields: Mapping[str, Any]) -> None:
    """Return if the fields have the same values on all ranks, which call it together.

    Args:
        ranks: of a process group; nothing is compared for a process alone.
        fields: values by the names that a user knows them by, the first ones to be named first: of a Content its
            digest is compared, of anything else what JSON makes of it.

    Raises:
        RanksDifferError: on every rank: "optim.lr differs between ranks: 2e-05 on rank 0, 3e-05 on rank 1".
    """
    if ranks.group is None:
        return
    compared = {name: _compared(value) for name, value in fields.items()}
    if problem := describe_difference(ranks.all_gather(compared)):
        # A rank that ended before another has its report would be taken for one that was killed.
        with contextlib.suppress(RuntimeError):
            ranks.barrier()
        raise RanksDifferError(problem)


def check_same_folder(ranks: Ranks, name: str, folder: Path) -> None:
    """Return if `folder`, there or not yet, is one and the same on all ranks, which call it together.

    A file that the first rank makes, for a moment, in the folder or in the nearest one above it that is there, must be
    seen by all: paths may lead to one folder by different names, and one name to different folders on two machines.

    Raises:
        RanksDifferError: on every rank.
    """
    if ranks.group is None:
        return
    whole = folder.resolve()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    mark = there / f".ranks-{secrets.token_hex(8)}"
    if ranks.is_first:
        # Where nothing can be written, names are all there is to compare.
        with contextlib.suppress(OSError):
            mark.touch(exist_ok=False)
    path, below, host = str(whole), str(whole.relative_to(there)), socket.gethostname()
    try:
        first = ranks.broadcast(
            {"path": path, "below": below, "host": host, "mark": mark.name if mark.exists() else None}
        )
        if first["mark"] is None:
            same = first["path"] == path
        else:
            same = first["below"] == below and _is_seen(there / first["mark"], patient=first["host"] != host)
        other = "" if same or path != first["path"] else f", another folder on {host},"
        check_same_on_ranks(ranks, {name: _Shown(same, f"{path}{other}")})
    finally:
        if ranks.is_first:
            with contextlib.suppress(OSError):
                mark.unlink()
    # From here on the folder is as it was.
    ranks.barrier()


def flat_settings(settings: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass, and of those in it, by names such as "optim.lr" and "data.sources[0].weight".

    Args:
        without: names to leave out, with [] for any number: "data.sources[].path".
    """
    found: dict[str, Any] = {}
    _flatten(dataclasses.asdict(settings), "", "", frozenset(without), found)
    return found


def compared_settings(config: TrainConfig) -> dict[str, Any]:
    """What the ranks of a training run must be told alike."""
    return flat_settings(config, OF_ONE_RANK)


def describe_difference(reports: Sequence[Mapping[str, Sequence[str]]]) -> str:
    """What the reports of the ranks, each [what is compared, what is shown] by name, differ in; empty if in nothing."""
    names = list(dict.fromkeys(name for report in reports for name in report))
    differing = [name for name in names if len({_of(report, name)[0] for report in reports}) > 1]
    if not differing:
        return ""
    ranks_of: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        ranks_of.setdefault(_of(report, differing[0])[0], []).append(rank)
    found = [f"{_of(reports[own[0]], differing[0])[1]} on {_named(own)}" for own in ranks_of.values()]
    text = f"{differing[0]} differs between ranks: {', '.join(_first_few(found))}"
    return text + (f" (so do {', '.join(_first_few(differing[1:]))})" if differing[1:] else "")


@dataclass(frozen=True)
class _Shown:
    """A value that is shown as something else."""

    value: Any
    text: str


def _compared(value: Any) -> tuple[str, str]:
    """What is compared of a value, and what is shown of it."""
    if isinstance(value, ContentHash):
        return value.digest, str(value)
    if isinstance(value, _Shown):
        return json.dumps(value.value), value.text
    text = json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
    return text, "none" if value is None else text.strip('"')


def _of(report: Mapping[str, Sequence[str]], name: str) -> Sequence[str]:
    return report.get(name, ("", "none"))


def _first_few(texts: Sequence[str]) -> list[str]:
    more = len(texts) - MOST_NAMED
    return [*texts[:MOST_NAMED], *([f"and {more} more"] if more > 0 else [])]


def _named(ranks: Sequence[int]) -> str:
    """ "rank 3", or "ranks 0-2 and 5": without a comma, which stands between values."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    if len(texts) > MOST_NAMED:
        texts = [*texts[:MOST_NAMED], "others"]
    return f"rank{'s' if len(ranks) > 1 else ''} {' and '.join(texts)}"


def _is_seen(mark: Path, *, patient: bool) -> bool:
    """Whether a file that another process has made is there; on a network disk it may take its time."""
    until = time.monotonic() + (SECONDS if patient else 0)
    while not mark.exists():
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)
    return True


def _flatten(value: Any, name: str, pattern: str, without: frozenset[str], found: dict[str, Any]) -> None:
    if pattern in without:
        return
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            dot = "." if name else ""
            _flatten(inner, f"{name}{dot}{key}", f"{pattern}{dot}{key}", without, found)
    elif isinstance(value, list | tuple) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            _flatten(inner, f"{name}[{number}]", f"{pattern}[]", without, found)
    else:
        found[name] = value
