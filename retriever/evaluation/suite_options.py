"""Options of an evaluation of a model on BEIR sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from index.ann.gpu.search import Spread
from index.store.shards import StoreDtype
from retriever.evaluation.set_settings import SetSettings

LowerPrecision = Literal["int8", "binary", "binary+int8"]
"""Precision of the passages' embeddings in further results."""


@dataclass(frozen=True)
class SuiteOptions:
    """Options of an evaluation; the defaults suit most users."""

    k: int = 1000
    """Passages per query in the run."""
    windows: bool = False
    """Split long documents into windows and score a document by its best window, instead of truncating it."""
    overlap: int = 32
    """Tokens shared by consecutive windows."""
    factory: str | None = None
    """Faiss factory string of an index that is built for each corpus and evaluated in addition to exact search."""
    index: Path | None = None
    """Existing index of the same corpus and model, evaluated in addition to exact search."""
    index_device: str = "auto"
    """Where an index is searched, see `retriever.utils.indexes.place_index`."""
    index_spread: Spread = "auto"
    """How several GPUs are used, see `Index.to`."""
    settings: Mapping[str, SetSettings] = field(default_factory=dict)
    """Prompts and maximum lengths by set."""
    dangling: bool = False
    """Continue if the qrels judge passages or queries that do not exist."""
    keep_identical_ids: bool = False
    """Keep passages that have the id of their query."""
    dtype: StoreDtype = "float32"
    """Dtype of the vectors on disk."""
    shard_rows: int = 65536
    """Passages per shard of the store."""
    dims: tuple[int, ...] = ()
    """Dimensions to which the embeddings are truncated for further results of exact search."""
    precisions: tuple[LowerPrecision, ...] = ()
    """Precisions of the passages' embeddings for further results, for each of `dims` or all dimensions."""
