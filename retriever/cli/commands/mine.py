"""`retriever mine`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.progress import Reporter
from retriever.cli.commands.common import Embedding, IndexDevice, Switch, answer
from retriever.config.sources import PairFormat
from retriever.utils.torchrun import rank


@dataclass(frozen=True, kw_only=True)
class Mine(IndexDevice, Embedding):
    """Find hard negatives for the queries of a training source, and write a file that is a training source itself.

    An interrupted command continues when it is repeated. Under torchrun the processes share the work.
    """

    data: str
    """A BEIR folder, a .jsonl, .csv, .tsv or .parquet file, a folder of a Hugging Face dataset, or a hub name."""
    out: Path
    """The .jsonl file to write, with query, positive, negatives and scores."""
    corpus: Path | None = None
    """Passages to search: a BEIR folder (its corpus) or a file of passages. None: the corpus of --data if it is a BEIR
    folder, otherwise all positives and negatives of the source."""
    index: Path | None = None
    """Index to search, built from embeddings of the same model. None: exact search."""
    embeddings: Path | None = None
    """Folder for the embeddings of the corpus; existing ones are reused, and incomplete ones completed. With --index:
    the store that the index was built from, for exact scores. None: a temporary folder."""
    split: str = "train"
    """Split of a BEIR folder or a Hugging Face dataset."""
    format: PairFormat = "auto"
    """Format of the source; huggingface for a hub name."""
    query_column: str = "query"
    """Column of the query."""
    positive_column: str = "positive"
    """Column of the positive or a list of positives."""
    negatives_column: str = "negatives"
    """Column of hard negatives, which are searched, too; may be absent."""
    negatives: int = 7
    """Maximum number of negatives per row. 0: find none, only filter pairs."""
    depth: int = 100
    """Number of candidates per query: the highest-scoring texts, without duplicates, empty texts and positives."""
    skip: int = 0
    """Number of best candidates that are skipped."""
    max_share: float | None = 0.95
    """Drop candidates that score above this share of the best positive's score, because many of them are unjudged
    positives. None: no such limit."""
    margin: float | None = None
    """Drop candidates whose score is not at least this far below that of the best positive. None: no such limit."""
    max_score: float | None = None
    """Drop candidates with a higher score than this. None: no such limit."""
    min_score: float | None = None
    """Drop candidates with a lower score than this. None: no such limit."""
    sampling: Literal["top", "random"] = "top"
    """Which candidates are used. top: those with the highest scores. random: a random choice."""
    seed: int = 0
    """Seed of the random choice."""
    cross_encoder: str | None = None
    """Folder or hub name of a cross-encoder, which may end in @revision. Its scores replace those of the model once the
    candidates are found."""
    keep_top: int | None = None
    """Keep a pair only if its passage is among this many texts that the model scores highest for its query. None: keep
    all pairs."""
    keep_identical_ids: Switch = False
    """Keep passages of a BEIR folder that have their query's id and are not judged for it. By default they are left
    out, as in evaluation."""

    def run(self, reporter: Reporter) -> int:
        from retriever.mining.mine import mine

        mined = mine(
            self.model,
            self.data,
            self.out,
            corpus=self.corpus,
            index=self.index,
            embeddings=self.embeddings,
            split=self.split,
            format=self.format,
            query_column=self.query_column,
            positive_column=self.positive_column,
            negatives_column=self.negatives_column,
            negatives=self.negatives,
            depth=self.depth,
            skip=self.skip,
            max_share=self.max_share,
            margin=self.margin,
            max_score=self.max_score,
            min_score=self.min_score,
            sampling=self.sampling,
            seed=self.seed,
            cross_encoder=self.cross_encoder,
            keep_top=self.keep_top,
            keep_identical_ids=self.keep_identical_ids,
            **self.embedding_options(),
            **self.index_options(),
            progress=reporter,
        )
        if rank() == 0:
            values = {
                "out": str(mined.path),
                "queries": mined.queries,
                "with_fewer_negatives": mined.with_fewer_negatives,
            }
            if self.keep_top is not None:
                values["dropped_pairs"] = mined.dropped_pairs
            answer(self.json, values)
        return 0
