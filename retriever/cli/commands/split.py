"""`retriever split`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.progress import Reporter
from retriever.cli.commands.common import Switch


@dataclass(frozen=True, kw_only=True)
class Split:
    """Split pairs into a BEIR folder with a train, a dev and a test set that share no query and no positive."""

    data: str
    """What `retriever train` reads pairs from: a .jsonl, .csv, .tsv (each also .gz) or .parquet file, a BEIR folder, a
    Hugging Face dataset folder."""
    out: Path
    """Folder to make: corpus.jsonl, queries.jsonl, qrels/train.tsv, dev.tsv and test.tsv, and train.jsonl, the training
    rows with their hard negatives, for which qrels have no place. Every text is in the corpus or the queries once,
    without white space around it, with an id made of the text."""
    dev: int | float | None = None
    """Queries of the dev set, or their share (0.1); 0: no dev set; empty: a share of 0.05, at most 1000. A share is at
    least 1 query. Groups are kept whole, so there may be some more or fewer."""
    test: int | float | None = None
    """Likewise of the test set."""
    by: Literal["component", "query"] | None = None
    """component: queries that share positives, directly or through others, stay in one split. query: splits share no
    query, but may share positives. Empty: component, and query, with a line that says so, where groups are too large
    to give at least half and at most twice the sizes asked for."""
    seed: int = 0
    """Of the random choice, which does not depend on the order of the rows."""
    passages: Path | None = None
    """File (_id, title, text) or BEIR folder with further passages for the corpus; their ids are made of the texts."""
    format: Literal["auto", "beir", "jsonl", "csv", "tsv", "parquet", "huggingface"] = "auto"
    """How to read --data; auto goes by what is found there."""
    query: str = "query"
    """Column with the query's text."""
    positive: str = "positive"
    """Column with the positive passage, or a list of them."""
    negatives: str = "negatives"
    """Column with the hard negative passage, or a list of them; may be absent. negative_* stands for every column that
    matches."""
    split: str = "train"
    """Split of a BEIR folder (qrels/SPLIT.tsv) or a Hugging Face dataset that is split further."""
    json: Switch = False
    """Print the answer as JSON."""

    def __post_init__(self) -> None:
        from retriever.data.query_groups import check_size

        if not self.data:
            raise ValueError("--data: expected a file or a folder, found nothing")
        check_size("--dev", self.dev)
        check_size("--test", self.test)

    def run(self, reporter: Reporter) -> int:
        from retriever.data.split import split

        report = split(
            self.data,
            self.out,
            dev=self.dev,
            test=self.test,
            by=self.by,
            seed=self.seed,
            passages=self.passages,
            format=self.format,
            query=self.query,
            positive=self.positive,
            negatives=self.negatives,
            split=self.split,
            reporter=reporter,
        )
        if self.json:
            print(json.dumps(dataclasses.asdict(report), ensure_ascii=False))
            return 0
        print(f"{report.out}  passages {report.passages:,}  groups {report.groups:,}  by {report.by}")
        for name, queries in report.queries.items():
            print(f"{name}  queries {queries:,}  pairs {report.pairs[name]:,}  rows {report.rows[name]:,}")
        return 0
