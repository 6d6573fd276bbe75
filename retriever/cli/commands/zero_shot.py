"""`retriever evaluate zero-shot`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from index.progress import Reporter
from retriever.cli.commands.common import Embedding


@dataclass(frozen=True, kw_only=True)
class EvaluateZeroShot(Embedding):
    """Score a model of images and texts that was not trained on the task: classification by prompts (acc1, acc5, mean
    per-class recall, mAP) and retrieval in both directions (recall@1/5/10, median rank), beside their chance levels."""

    data: tuple[Path, ...]
    """Sets: a folder with a folder of images for each class, a webdataset folder in CLIP_benchmark's layout, or a
    .jsonl, .csv, .tsv or .parquet file with the columns image and label, labels or captions."""
    out: Path
    """Folder of the report; embeddings found there are used again."""
    split: str = "test"
    """Folder within a set that is taken, where there is one of that name."""
    templates: Path | None = None
    """Prompts, one a line with {c} for the class, instead of the sets' own; empty: the set's
    zeroshot_classification_templates.txt, and general ones where it has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("--data: expected at least one set of images, found none")

    def run(self, reporter: Reporter) -> int:
        from eval.zero_shot.report import json_of, summary_table
        from retriever.evaluation.zero_shot import check_out, evaluate_zero_shot, open_sets

        # Before the model, because reading it takes longer than to see that a folder is wrong.
        sets = open_sets(self.data, self.split, self.templates)
        check_out(self.out, sets)
        towers = self.picture_towers()
        report = evaluate_zero_shot(towers, sets, self.out, self.options(), reporter, details={"model": self.model})
        if self.json:
            print(json.dumps(json_of(report), ensure_ascii=False))
        else:
            print("\n".join(summary_table(found) for found in report.sets), end="")
            reporter.line(f"report: {self.out / 'report.html'}")
        return 0
