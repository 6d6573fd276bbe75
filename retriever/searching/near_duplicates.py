"""The public function `retriever.near_duplicates`, which finds groups of near-duplicates in an embedding store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from index.exact.near_duplicates import near_duplicates as search_pairs
from index.files import atomic_path
from index.progress import Progress, as_reporter
from index.store.reader import EmbeddingStore
from retriever.errors import ArgumentError, check_numbers, check_paths
from retriever.utils.check_progress import checksum_progress
from retriever.utils.device import choose_device


@dataclass(frozen=True)
class NearDuplicate:
    """A member of a group of near-duplicates.

    Attributes:
        id: Its id.
        nearest: Id of the most similar other member.
        score: Cosine similarity of the two.
    """

    id: str
    nearest: str
    score: float


@dataclass(frozen=True)
class NearDuplicates:
    """What `retriever.near_duplicates` returns.

    Attributes:
        groups: The groups, each in the order of the store.
        rows: Number of embeddings of the store.
        threshold: The smallest cosine similarity of a pair.
    """

    groups: list[list[NearDuplicate]]
    rows: int
    threshold: float

    @property
    def redundant(self) -> list[str]:
        """Ids of all members but the first of each group: without them, no near-duplicates are left."""
        return [member.id for group in self.groups for member in group[1:]]

    def save(self, path: str | Path) -> Path:
        """Write a JSON line for each group: `{"group": 1, "members": [{"id", "nearest", "score"}, …]}`."""
        check_paths(path=path)
        with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for number, group in enumerate(self.groups, start=1):
                line = {"group": number, "members": [asdict(member) for member in group]}
                stream.write(f"{json.dumps(line, ensure_ascii=False)}\n")
        return Path(path)

    def __repr__(self) -> str:
        return f"NearDuplicates(groups={len(self.groups)}, redundant={len(self.redundant)}, rows={self.rows})"


def near_duplicates(
    embeddings: EmbeddingStore | str | Path,
    *,
    threshold: float = 0.95,
    device: str = "auto",
    progress: Progress = None,
) -> NearDuplicates:
    """Find groups of near-duplicate texts or images in an embedding store.

    Two rows are near-duplicates if the cosine similarity of their embeddings is at least `threshold`. Rows that a chain
    of such pairs connects are one group. The search is exact: every row is compared with every other in float32, and
    the pairs that are found in float64. Time is quadratic in the number of rows, memory linear.

    What a similarity means depends on the model: look at some groups before you remove anything.

    Args:
        embeddings: A store from `retriever.encode`, or its folder.
        threshold: Smallest cosine similarity of a pair, above 0 and at most 1. 1: the same vector up to its length.
            Default: 0.95.
        device: Where to compare. Default: "auto".
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The groups.

    Raises:
        InputError: The store is damaged, or a vector of it is zero.
        ConfigError: An argument is invalid.
    """
    check_numbers(threshold=threshold)
    if not 0 < threshold <= 1:
        raise ArgumentError("threshold", f"expected a cosine similarity over 0 and at most 1, found {threshold}")
    reporter = as_reporter(progress)
    if not isinstance(embeddings, EmbeddingStore):
        check_paths(embeddings=embeddings)
        embeddings = EmbeddingStore.open(embeddings)
    with checksum_progress(reporter, [embeddings.folder]) as checked:
        embeddings.check(checked)
    ids, rows = embeddings.ids(), embeddings.rows
    with reporter.bar("compare", rows * (rows - 1) // 2, "pairs") as advance:
        found = search_pairs(embeddings.shards, ids, threshold, device=choose_device(device), progress=advance)

    def members() -> Iterator[list[NearDuplicate]]:
        for group in found.groups():
            yield [
                NearDuplicate(ids[row], ids[int(found.nearest[row])], float(found.score[row])) for row in group.tolist()
            ]

    return NearDuplicates(list(members()), rows, threshold)
