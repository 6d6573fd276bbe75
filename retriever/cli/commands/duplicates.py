"""`retriever duplicates`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from index.progress import Reporter
from retriever.cli.commands.common import Switch, answer


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Find groups of near-duplicate texts or images in an embedding store.

    Every embedding is compared with every other, exactly. Rows that a chain of similar pairs connects are one group.
    """

    embeddings: Path
    """Store of `retriever encode`."""
    out: Path
    """File to write, .jsonl: a line for each group, with the id of each member, the id of its nearest member, and
    their cosine similarity."""
    threshold: float = 0.95
    """Smallest cosine similarity of a pair, above 0 and at most 1."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto: CUDA if there is a GPU."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self, reporter: Reporter) -> int:
        from retriever.searching.near_duplicates import near_duplicates

        found = near_duplicates(self.embeddings, threshold=self.threshold, device=self.device, progress=reporter)
        found.save(self.out)
        counts = {"rows": found.rows, "groups": len(found.groups), "redundant": len(found.redundant)}
        answer(self.json, {**counts, "out": str(self.out)})
        return 0
