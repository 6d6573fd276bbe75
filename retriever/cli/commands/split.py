"""`retriever split`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.progress import Reporter
from retriever.cli.commands.common import Switch
from retriever.config.sources import PairFormat


@dataclass(frozen=True, kw_only=True)
class Split:
    """Split pairs into a BEIR folder whose train, dev and test sets share no query and no positive."""

    data: str
    """Pairs, as `retriever train` reads them: a .jsonl, .csv, .tsv (each also .gz) or .parquet file, a BEIR folder, or
    a Hugging Face dataset folder."""
    out: Path
    """New folder for corpus.jsonl, queries.jsonl, qrels/train.tsv, qrels/dev.tsv, qrels/test.tsv, and train.jsonl, the
    training rows with their hard negatives. Each text is written once, without surrounding white space; its id is a
    hash of the text."""
    dev: int | float | None = None
    """Number of dev queries, or their share (0.1). 0: no dev set. None: a share of 0.05, at most 1000 queries. A share
    gives at least one query. Groups are kept together, so the number may differ a little."""
    test: int | float | None = None
    """Number of test queries, or their share, as for --dev."""
    by: Literal["component", "query"] | None = None
    """component: queries that share positives, directly or through others, stay in one set. query: sets share no query
    but may share positives. None: component; query, with a message, if the groups are too large to give between half
    and twice the requested sizes."""
    seed: int = 0
    """Seed of the random choice, which does not depend on the order of the rows."""
    passages: Path | None = None
    """File (_id, title, text) or BEIR folder with further passages for the corpus."""
    format: PairFormat = "auto"
    """Format of --data. auto: detected from the path and its content."""
    query: str = "query"
    """Column with the text of the query."""
    positive: str = "positive"
    """Column with the positive passage, or a list of them."""
    negatives: str = "negatives"
    """Column with the hard negative, or a list of them; may be absent. negative_* means every column that matches."""
    split: str = "train"
    """Split of a BEIR folder (qrels/SPLIT.tsv) or Hugging Face dataset to split further."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        from retriever.data.splitting.query_groups import check_size

        if not self.data:
            raise ValueError("--data: expected a file or a folder, found nothing")
        check_size("--dev", self.dev)
        check_size("--test", self.test)

    def run(self, reporter: Reporter) -> int:
        from retriever.data.splitting.split import split

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
            progress=reporter,
        )
        if self.json:
            print(json.dumps(dataclasses.asdict(report), ensure_ascii=False))
            return 0
        print(f"{report.out}  passages {report.passages:,}  groups {report.groups:,}  by {report.by}")
        for name, queries in report.queries.items():
            print(f"{name}  queries {queries:,}  pairs {report.pairs[name]:,}  rows {report.rows[name]:,}")
        return 0
