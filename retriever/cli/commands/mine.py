"""`retriever mine`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from index.files import InputError
from index.progress import Reporter
from retriever.cli.commands.common import Embedding, Switch, answer, check_counts


@dataclass(frozen=True, kw_only=True)
class Mine(Embedding):
    """Find hard negatives for the queries of a BEIR folder; the file written is a training source as it is."""

    data: Path
    """BEIR folder."""
    out: Path
    """The .jsonl file, of query, positive and negatives."""
    embeddings: Path | None = None
    """Folder of the corpus's embeddings, continued or used again if there; empty for a temporary one."""
    split: str = "train"
    """Which qrels."""
    negatives: int = 7
    """Most negatives a query."""
    depth: int = 100
    """Candidates a query: the texts that score best for it, copies, empty ones and positives left out."""
    max_share: float = 0.95
    """A candidate above this share of the best positive's score is taken for an unjudged positive and dropped."""

    keep_identical_ids: Switch = False
    """Take passages that have their query's id and are not judged for it; they are left out as in evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "negatives", "depth")
        if self.out.suffix != ".jsonl":
            raise ValueError(f"--out: expected a .jsonl file, found {self.out}")
        if self.out.is_dir():
            raise InputError(f"--out: expected a file, found the folder {self.out}")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"--max-share: expected more than 0 and at most 1, found {self.max_share}")

    def run(self, reporter: Reporter) -> int:
        from index.beir import BeirDataset
        from retriever.searching.mining import mine_with_towers

        written, short = mine_with_towers(
            self.towers(reporter),
            BeirDataset.open(self.data, self.split),
            self.out,
            self.options(),
            reporter,
            embeddings=self.embeddings,
            negatives=self.negatives,
            depth=self.depth,
            max_share=self.max_share,
            keep_identical_ids=self.keep_identical_ids,
        )
        answer(self.json, {"out": str(self.out), "queries": written, "with_fewer_negatives": short})
        return 0
