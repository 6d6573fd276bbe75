"""`retriever score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.progress import Reporter
from retriever.cli.commands.common import Embedding, Switch, answer
from retriever.config.sources import PairFormat
from retriever.utils.torchrun import rank


@dataclass(frozen=True, kw_only=True)
class Score(Embedding):
    """Write a model's scores of the positives and negatives of a training source, for distillation.

    The model may be a cross-encoder. An interrupted command continues when it is repeated. Under torchrun the processes
    share the work.
    """

    data: str
    """A training source, for example the file of `retriever mine`: a BEIR folder, a .jsonl, .csv, .tsv or .parquet
    file, a folder of a Hugging Face dataset, or a hub name."""
    out: Path
    """The .jsonl file to write, with query, positive, negatives and scores."""
    kind: Literal["auto", "cross-encoder", "bi-encoder"] = "auto"
    """What the model is. auto: read from its folder."""
    logits: Switch = False
    """Write a cross-encoder's outputs before its activation function, as MarginMSE and KL expect them."""
    split: str = "train"
    """Split of a BEIR folder or a Hugging Face dataset."""
    format: PairFormat = "auto"
    """Format of the source; huggingface for a hub name."""
    query_column: str = "query"
    """Column of the query."""
    positive_column: str = "positive"
    """Column of the positive or a list of positives."""
    negatives_column: str = "negatives"
    """Column of the hard negatives; may be absent."""

    def run(self, reporter: Reporter) -> int:
        from retriever.mining.score import score

        scored = score(
            self.model,
            self.data,
            self.out,
            kind=self.kind,
            logits=self.logits,
            split=self.split,
            format=self.format,
            query_column=self.query_column,
            positive_column=self.positive_column,
            negatives_column=self.negatives_column,
            **self.embedding_options(),
            progress=reporter,
        )
        if rank() == 0:
            answer(self.json, {"out": str(scored.path), "rows": scored.rows, "pairs": scored.pairs})
        return 0
