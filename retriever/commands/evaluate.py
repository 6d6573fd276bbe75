"""`retriever evaluate …`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from retriever.commands.common import Embedding, check_counts
from retriever.progress import Terminal


@dataclass(frozen=True, kw_only=True)
class EvaluateBeir(Embedding):
    """Score a model on BEIR folders: nDCG, MAP, recall, precision and MRR, with run files and a report."""

    data: tuple[Path, ...]
    """BEIR folders."""
    out: Path
    """Folder of the report; embeddings found there are used again."""
    split: str = "test"
    """Which qrels."""
    k: int = 1000
    """Passages a query in the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "k")
        if not self.data:
            raise ValueError("--data: expected at least one BEIR folder, found none")

    def run(self, terminal: Terminal) -> int:
        from eval.report import comparison_table
        from retriever.evaluate import evaluate_to_report

        results = evaluate_to_report(
            self.towers(),
            list(self.data),
            self.out,
            self.options(),
            terminal,
            split=self.split,
            k=self.k,
            details={"model": self.model},
        )
        if self.json:
            print(json.dumps({name: metrics.mean for name, metrics in results.items()}))
        else:
            print(comparison_table(results, head="data"), end="")
            terminal.line(f"report: {self.out / 'report.md'}")
        return 0
