"""Configuration of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retriever.config.checks import MAX_WORKERS, check_at_least, is_positive
from retriever.config.images import ImageSource
from retriever.config.sources import SourceConfig


@dataclass(frozen=True)
class DataConfig:
    """The training data."""

    sources: tuple[SourceConfig, ...] = ()
    """Sources of text pairs. The first lines of a run, and --dry-run, say the share of each."""
    images: tuple[ImageSource, ...] = ()
    """Sources of images with captions, instead of data.sources, for a model with an image tower."""
    positives: Literal["draw", "all"] = "draw"
    """How a row with several positives is used. draw: one positive is drawn at each step. all: all positives are used
    at once, see loss.positives_reduction; loss.limit then follows from the score of a positive that is drawn."""
    max_positives: int = 8
    """Maximum number of positives per query with positives all. Of a row with more, this many are drawn."""
    negatives: int = 0
    """Number of hard negatives per query, from the `negatives` column of each source. All of them are used if a row has
    fewer."""
    negatives_seen_by: Literal["all", "own"] = "all"
    """Whether a hard negative is a negative of all queries of the batch, or only of its own query, as in the literature
    before large batches. With own, loss.statistics, loss.limit and the symmetric part of the loss leave them out."""
    mix: Literal["steps", "blocks", "pool"] = "steps"
    """How several sources are mixed. steps: each batch comes from one source, drawn in proportion to the shares.
    blocks: each batch has rows of every source in proportion to the shares, and only passages of the same source are
    negatives of a query. pool: as blocks, but all passages of the batch are negatives."""
    clusters: int | None = None
    """Number of topic clusters of each source; each batch comes from one of them, so that its negatives are harder
    (arXiv 2407.18887). k-means over the positives, embedded with the model before training; clusters with fewer rows
    than batch_size are merged with the nearest one. None: batches are random rows of a source."""
    temperature: float = 1.0
    """Without weights, the share of a source is proportional to its number of rows to the power of 1 / temperature.
    Larger values make small sources come more often."""
    random_passages: int = 0
    """Number of passages that are drawn from data.corpus at each step, over all processes, as further negatives of all
    queries. Known positives of a query are masked."""
    corpus: str = ""
    """BEIR folder or file of passages (.jsonl, .csv, .tsv, .parquet) for random_passages."""
    workers: int | None = None
    """Number of processes that load and tokenize batches in the background. 0: load in the main process. None: on a GPU
    the number of available processors minus 4, at most 12; on a CPU 1. The order of the data does not depend on it."""
    cache: str | None = None
    """Folder of the memory-mapped copies of the sources. None: a folder inside the run folder."""

    @property
    def listed(self) -> tuple[SourceConfig | ImageSource, ...]:
        """The sources of a run: of images if there are any, otherwise of texts."""
        return self.images or self.sources

    @property
    def texts_per_query(self) -> int:
        """Largest number of texts of a query in a batch, itself included."""
        return 1 + (self.max_positives if self.positives == "all" else 1) + self.negatives

    def __post_init__(self) -> None:
        check_at_least(self, "data.", 0, "negatives", "random_passages")
        if bool(self.random_passages) != bool(self.corpus):
            raise ValueError("data.corpus: expected together with data.random_passages, found one without the other")
        if self.mix == "blocks" and self.random_passages:
            raise ValueError("data.random_passages: expected 0 with data.mix blocks, which has no pool for them")
        if self.images and self.random_passages:
            raise ValueError("data.random_passages: expected 0 with data.images")
        check_at_least(self, "data.", 0, "workers", maximum=MAX_WORKERS)
        check_at_least(self, "data.", 1, "max_positives")
        if self.negatives_seen_by == "own" and not self.negatives:
            raise ValueError("data.negatives_seen_by: expected all without data.negatives, found own")
        if self.images and self.positives == "all":
            raise ValueError("data.positives: expected draw with data.images, found all")
        if self.images and self.negatives_seen_by == "own":
            raise ValueError("data.negatives_seen_by: expected all with data.images, found own")
        if not is_positive(self.temperature):
            raise ValueError(f"data.temperature: expected a positive number, found {self.temperature}")
        check_at_least(self, "data.", 2, "clusters")
        if self.clusters and self.images:
            raise ValueError("data.clusters: expected none with data.images")
        if self.clusters and self.mix != "steps":
            raise ValueError(f"data.mix: expected steps with data.clusters, found {self.mix}")
        if self.mix == "pool" and any(source.loss.given for source in self.sources):
            raise ValueError("data.mix: expected steps or blocks if a source has options of the loss, found pool")
        if self.mix != "steps" and self.images:
            raise ValueError(f"data.mix: expected steps with data.images, found {self.mix}")
        weights = [source.weight for source in self.sources] + [source.weight for source in self.images]
        if self.temperature != 1 and any(weight is not None for weight in weights):
            raise ValueError(f"data.temperature: expected 1 with weights, found {self.temperature}")
        _check_weights("data.sources", self.sources)
        _check_weights("data.images", self.images)


def _check_weights(name: str, sources: tuple[SourceConfig, ...] | tuple[ImageSource, ...]) -> None:
    """Check that all sources have a weight or none has: a weight of 1 beside the number of rows of another source
    would hardly ever be drawn, one of 100,000 almost always."""
    weighted = [source.path for source in sources if source.weight is not None]
    missing = [source.path for source in sources if source.weight is None]
    if weighted and missing:
        raise ValueError(
            f"{name}: weight: expected a weight for every source or for none, found one for {weighted[0]} and none "
            f"for {missing[0]}"
        )
