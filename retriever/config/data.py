"""Configuration of the training data."""

from __future__ import annotations

from dataclasses import dataclass

from retriever.config.checks import MAX_WORKERS, check_at_least
from retriever.config.images import ImageSource
from retriever.config.sources import SourceConfig


@dataclass(frozen=True)
class DataConfig:
    """The training data."""

    sources: tuple[SourceConfig, ...] = ()
    """Sources of text pairs. Each batch comes from one source, drawn in proportion to the weights."""
    images: tuple[ImageSource, ...] = ()
    """Sources of images with captions, instead of data.sources, for a model with an image tower."""
    negatives: int = 0
    """Number of hard negatives per query, from the `negatives` column of each source."""
    workers: int = 1
    """Number of processes that load and tokenize batches in the background. 0: load in the main process. The order of
    the data does not depend on it."""
    cache: str | None = None
    """Folder of the memory-mapped copies of the sources. None: a folder inside the run folder."""

    def __post_init__(self) -> None:
        check_at_least(self, "data.", 0, "negatives")
        check_at_least(self, "data.", 0, "workers", maximum=MAX_WORKERS)
