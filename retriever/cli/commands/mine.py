"""`retriever mine`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from index.progress import Reporter
from retriever.cli.commands.common import Embedding, Switch, answer


@dataclass(frozen=True, kw_only=True)
class Mine(Embedding):
    """Find hard negatives for the queries of a BEIR folder; the file can be a training source without changes."""

    data: Path
    """BEIR folder."""
    out: Path
    """The .jsonl file to write, with query, positive and negatives."""
    embeddings: Path | None = None
    """Folder of the corpus's embeddings, continued or reused. None: a temporary folder."""
    split: str = "train"
    """Split of the qrels."""
    negatives: int = 7
    """Most negatives per query."""
    depth: int = 100
    """Candidates per query: the highest-scoring texts, without duplicates, empty texts and positives."""
    max_share: float = 0.95
    """Drop candidates that score above this share of the best positive's score: many are unjudged positives."""
    keep_identical_ids: Switch = False
    """Use passages that have their query's id and are not judged for it; they are left out as in evaluation."""

    def run(self, reporter: Reporter) -> int:
        from retriever.searching.mine import mine

        mined = mine(
            self.model,
            self.data,
            self.out,
            embeddings=self.embeddings,
            split=self.split,
            negatives=self.negatives,
            depth=self.depth,
            max_share=self.max_share,
            keep_identical_ids=self.keep_identical_ids,
            **self.embedding_options(),
            progress=reporter,
        )
        values = {"out": str(mined.path), "queries": mined.queries, "with_fewer_negatives": mined.with_fewer_negatives}
        answer(self.json, values)
        return 0
