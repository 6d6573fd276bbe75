"""Configuration of the sources of text pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from retriever.config.loss_options import SourceLossConfig

PairFormat = Literal["auto", "beir", "jsonl", "csv", "tsv", "parquet", "huggingface"]


@dataclass(frozen=True)
class SourceConfig:
    """One source of text pairs."""

    path: str
    """A BEIR folder, a .jsonl, .csv, .tsv (each also as .gz) or .parquet file, a folder of a Hugging Face dataset, or,
    with format huggingface, a hub name: owner/name, owner/name:subset or owner/name:subset@revision."""
    format: PairFormat = "auto"
    """Format of the path. auto: detected from the path and its content."""
    split: str = "train"
    """Split of a BEIR folder (qrels/SPLIT.tsv) or a Hugging Face dataset."""
    query: str = "query"
    """Column with the query."""
    positive: str = "positive"
    """Column with the positive passage or a list of positive passages."""
    negatives: str = "negatives"
    """Column with the hard negative or a list of hard negatives; may be absent. A name with * selects all matching
    columns in order (negative_*: negative_1, negative_2, …). Empty cells are ignored."""
    scores: str = "scores"
    """Column with a teacher's scores, for distillation; may be absent. A list with a number for each positive and then
    for each hard negative, in order; a null cell is a row without scores. Several columns are separated by a comma
    (pos_scores,neg_scores) or selected with * (score_*), and their numbers are joined. Empty: scores are not read."""
    query_prompt_column: str | None = None
    """Column with the prompt of each row's query; a null cell takes query_prompt. None: every row has query_prompt."""
    passage_prompt_column: str | None = None
    """Column with the prompt of each row's passages; a null cell takes passage_prompt. None: every row has
    passage_prompt."""
    copy: bool = True
    """Copy the rows into data.cache once, as a memory-mapped file. False: read them from the file at every step, for
    sources that should not be stored twice; only for .jsonl files. The cache then has 16 bytes per row."""
    weight: float | None = None
    """Share of the batches that come from this source, relative to the weights of the other sources, which must then
    have one, too. None for all sources: their numbers of rows, at least batch_size."""
    query_prompt: str | None = None
    """Text that is put before each query of this source. None: the prompt of the model. A prompt shared by all sources
    is saved as the prompt of the model; otherwise the prompts are saved under the names of their sources."""
    passage_prompt: str | None = None
    """Text that is put before each passage of this source. None: the prompt of the model. Saved as query_prompt is."""
    loss: SourceLossConfig = field(default_factory=SourceLossConfig)

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.sources: path: expected a file, a folder or a hub name, found nothing")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"data.sources: weight: expected a positive number, found {self.weight}")
