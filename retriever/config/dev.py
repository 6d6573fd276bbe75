"""Configuration of the evaluation during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retriever.config.checks import check_at_least


def split_of_path(path: str) -> tuple[str, str | None]:
    """Return folder and split of an item of `dev.paths`, PATH or PATH:SPLIT."""
    folder, colon, split = path.rpartition(":")
    return (folder, split) if colon and not Path(path).exists() and "/" not in split else (path, None)


@dataclass(frozen=True)
class DevConfig:
    """Evaluation during training. The model with the best score is kept."""

    path: str = ""
    """BEIR folder; for a model with an image tower, a dataset of `retriever evaluate zero-shot`. Empty: no evaluation,
    and the last model is kept."""
    paths: tuple[str, ...] = ()
    """Several dev sets, instead of dev.path. The mean of their scores chooses the model, as in NanoBEIR. A set with
    another split than dev.split is given as PATH:SPLIT."""
    split: str = "dev"
    """Split: the name of the qrels file in a BEIR folder, or of the folder in an image dataset."""
    every: int = 500
    """Steps between evaluations. The last step is always followed by one."""
    at_start: bool = True
    """Evaluate before the first step, too, so that the model card and the plot compare the model before and after
    training. The model before training is never the one that is kept."""
    loss: bool = False
    """Also compute the loss on the dev set, in dev_loss: InfoNCE of the queries, each with its passage of the highest
    grade, among the passages of batch_size queries; other judged passages of a query are masked. With the loss sigmoid,
    that loss. Only for texts."""
    patience: int | None = None
    """Stop after this many consecutive evaluations without a better nDCG@10 (images: recall@1, acc1 or mean average
    precision). None: train all steps."""
    max_queries: int | None = None
    """Number of queries of each set to evaluate, the first ones sorted by id, against the full corpus. None: all
    queries."""
    dim: int | None = None
    """Evaluate embeddings truncated to this dimension, for a run with loss.matryoshka. None: all dimensions."""
    keep_identical_ids: bool = False
    """Keep passages that have the id of their query and are not judged for it, as trec_eval does. False: remove them,
    as BEIR does."""

    def __post_init__(self) -> None:
        if self.path and self.paths:
            raise ValueError("dev.paths: expected either dev.path or dev.paths, found both")
        if not all(self.paths):
            raise ValueError("dev.paths: expected a path, found an empty one")
        check_at_least(self, "dev.", 1, "every", "patience", "max_queries", "dim")
