"""Sources of training examples, as a configuration names them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SourceConfig:
    """One source of training examples."""

    path: str
    """A BEIR folder, a .jsonl, .csv, .tsv (each also .gz) or .parquet file, a Hugging Face dataset folder, or, with
    the format huggingface, a hub name: owner/name, owner/name:subset, owner/name:subset@revision."""
    format: Literal["auto", "beir", "jsonl", "csv", "tsv", "parquet", "huggingface"] = "auto"
    """How to read the path; auto goes by what is found there."""
    split: str = "train"
    """Split of a BEIR folder (qrels/SPLIT.tsv) or a Hugging Face dataset."""
    query: str = "query"
    """Column with the query's text."""
    positive: str = "positive"
    """Column with the positive passage, or a list of them."""
    negatives: str = "negatives"
    """Column with the hard negative passage, or a list of them; may be absent. A name with * stands for every column
    that matches, in their order (negative_*: negative_1, negative_2, ...); empty cells are no negatives."""
    weight: float | None = None
    """Share of the batches that come from this source, relative to the other sources' (none: its number of rows, at
    least that of a batch). The first lines of a run say each source's share."""
    query_prompt: str | None = None
    """Text put before each query (none: the model's own). One that all sources share is saved as the model's own, which
    the dev set and encoding use; where sources differ the model keeps its own, and theirs are saved by name."""
    passage_prompt: str | None = None
    """Text put before each passage (none: the model's own); saved as `query_prompt` is."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.sources: path: expected a file, a folder or a hub name, found nothing")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"data.sources: weight: expected a positive number, found {self.weight}")
