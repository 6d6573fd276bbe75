"""`retriever evaluate zero-shot`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from index.progress import Reporter
from retriever.cli.commands.common import Embedding


@dataclass(frozen=True, kw_only=True)
class EvaluateZeroShot(Embedding):
    """Score an image–text model on sets that it was not trained on.

    Classification by prompts (acc1, acc5, mean per-class recall, mAP) and retrieval in both directions (recall@1/5/10,
    median rank), with their chance levels.
    """

    data: tuple[Path, ...]
    """Sets: a folder with a folder of images for each class, a webdataset folder in CLIP_benchmark's layout, a .jsonl,
    .csv, .tsv or .parquet file with the columns image and label, labels or captions, or a folder of Parquet files or of
    a saved Hugging Face dataset."""
    out: Path
    """Folder of the report; embeddings found there are reused."""
    split: str = "test"
    """Folder within a set, if there is one of that name."""
    templates: Path | None = None
    """File with prompts, one per line with {c} for the class, instead of the sets' own; or a .json file with the
    prompts of each class, as CuPL publishes them. None: the set's zeroshot_classification_templates.txt, or general
    prompts if it has none."""
    image: str = ""
    """Column of tables with the image or its path. Empty: the first of image, filepath, file_name, path and file."""
    label: str = ""
    """Column of tables with the label. Empty: the first of label, labels and class."""
    caption: str = ""
    """Column of tables with the captions. Empty: the first of caption, captions, text and title."""

    def run(self, reporter: Reporter) -> int:
        from eval.zero_shot.report import json_of, summary_table
        from retriever.evaluation.zero_shot_sets import zero_shot

        report = zero_shot(
            self.model,
            self.data,
            out=self.out,
            split=self.split,
            templates=self.templates,
            image=self.image,
            label=self.label,
            caption=self.caption,
            **self.embedding_options(),
            progress=reporter,
        ).report
        if self.json:
            print(json.dumps(json_of(report), ensure_ascii=False))
        else:
            print("\n".join(summary_table(found) for found in report.sets), end="")
            reporter.line(f"report: {self.out / 'report.html'}")
        return 0
