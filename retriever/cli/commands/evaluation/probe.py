"""`retriever evaluate probe`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from index.progress import Reporter
from retriever.cli.commands.common import Embedding


@dataclass(frozen=True, kw_only=True)
class EvaluateProbe(Embedding):
    """Score the image embeddings of a model by classification with labeled training images.

    By the nearest neighbors, and by a linear probe (logistic regression): acc1, acc5 and mean per-class recall.
    """

    data: Path
    """Set of images with classes, in a layout of `retriever evaluate zero-shot`."""
    out: Path
    """Folder of probe.json; embeddings found there are reused."""
    train: Path | None = None
    """Set with the training images. None: the set --data."""
    train_split: str = "train"
    """Folder of the training images within their set, if there is one of that name."""
    split: str = "test"
    """Folder of the images to classify within --data, if there is one of that name."""
    neighbors: int = 20
    """Number of neighbors that vote, with the weights exp(cosine / 0.07)."""
    regularization: float | None = None
    """C of the linear probe, the inverse of the strength of its penalty as in scikit-learn. None: chosen among 0.001,
    0.01, …, 1,000,000 on a held-out fifth of the training images of each class."""
    image: str = ""
    """Column of tables with the image or its path. Empty: the first of image, filepath, file_name, path and file."""
    label: str = ""
    """Column of tables with the label. Empty: the first of label, labels and class."""
    seed: int = 0
    """Seed of the choice of held-out images."""

    def run(self, reporter: Reporter) -> int:
        from retriever.evaluation.probe import REPORT_FILE, probe

        found = probe(
            self.model,
            self.data,
            train=self.train,
            out=self.out,
            train_split=self.train_split,
            split=self.split,
            neighbors=self.neighbors,
            regularization=self.regularization,
            image=self.image,
            label=self.label,
            seed=self.seed,
            **self.embedding_options(),
            progress=reporter,
        )
        if self.json:
            print(json.dumps(found.report, ensure_ascii=False))
        else:
            print(found.table, end="")
            print(f"regularization of the linear probe: {found.report['linear probe']['regularization']:g}")
            reporter.line(f"report: {self.out / REPORT_FILE}")
        return 0
