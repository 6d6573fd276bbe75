"""Opening the training data of a run: from its configuration to tokenized batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index.files import InputError
from index.progress import Reporter
from retriever.config.data import DataConfig
from retriever.config.run import TrainConfig
from retriever.data.batches import BatchDataset
from retriever.data.false_negatives import Integers
from retriever.data.known_positives import KnownPositives, find_known_positives
from retriever.data.micro_batches import BatchPreparer, PreparedBatch
from retriever.data.passage_choice import PassageSettings
from retriever.data.schedules.clustered import ClusteredSchedule
from retriever.data.schedules.mixture import MixedSchedule
from retriever.data.schedules.schedule import BatchSchedule
from retriever.data.source_prompts import describe_source_prompts, source_prompts
from retriever.data.stored.corpus import CorpusTable, open_corpus
from retriever.data.table import ExampleTable, open_source
from retriever.distributed.share import Share
from retriever.errors import ConfigError
from retriever.models.modality import embeds_images
from retriever.models.towers import Towers
from retriever.utils.device import Precision


def open_training_data(
    config: TrainConfig,
    towers: Towers,
    cache: Path,
    *,
    precision: Precision,
    token_budget: int,
    reporter: Reporter,
    share: Share | None = None,
    dry_run: bool = False,
    cluster: Callable[[ExampleTable], list[Integers]] | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """Open the training data of a run, of texts or of images and captions.

    Args:
        config: Configuration of the run.
        towers: The towers, whose tokenizers are used.
        cache: Folder for converted sources.
        precision: Precision of precomputed image features.
        token_budget: Largest number of tokens in a micro-batch.
        reporter: Receives progress and messages.
        share: Rank and number of ranks; only the rows of this rank are read. Default: None, a single rank.
        dry_run: Whether to skip computations that only an actual run needs. Default: False.
        cluster: Returns the rows of each topic cluster of a table, with data.clusters. Default: None.

    Returns:
        The batches and the sha256 of each source. The batches have a length, the number of steps, and
        `loader(start=, workers=)`, which iterates over PreparedBatch.

    Raises:
        ConfigError: If the sources do not fit the model.
        InputError: If a source is missing or broken.
    """
    if embeds_images(towers):
        from retriever.data.images.loading import open_image_batches

        return open_image_batches(
            config,
            towers,
            cache,
            precision=precision,
            token_budget=token_budget,
            reporter=reporter,
            share=share,
            dry_run=dry_run,
        )
    if config.data.images:
        raise ConfigError("data.images: images need an image tower: set model.image.name")
    tables = open_tables(config.data, cache, reporter, mined=config.mine_every is not None)
    known = find_known_positives(tables, cache, reporter) if config.loss.masks_false_negatives else None
    clusters = None
    if config.data.clusters is not None and cluster is not None:
        # A plan has as many rows in each cluster.
        count = config.data.clusters
        clusters = [
            np.array_split(np.arange(len(table)), max(1, min(count, len(table) // config.batch_size)))
            if dry_run
            else cluster(table)
            for table in tables
        ]
    corpus = None
    if config.data.random_passages:
        with reporter.bar(f"read {config.data.corpus}", None, "passages") as advance:
            corpus = open_corpus(config.data.corpus, cache, progress=advance)
        if len(corpus) < config.data.random_passages:
            raise InputError(
                f"data.random_passages: expected at most {len(corpus):,}, the passages of {config.data.corpus}, found "
                f"{config.data.random_passages:,}"
            )
    batches = open_batches(config, tables, towers, token_budget, share, known, clusters, corpus)
    for line in [*batches.schedule.describe(), *describe_source_prompts(towers, config.data.sources)]:
        reporter.line(line)
    checksums = [table.sha256 for table in tables] + ([corpus.sha256] if corpus is not None else [])
    return batches, tuple(checksums)


def open_tables(config: DataConfig, cache: Path, reporter: Reporter, *, mined: bool = False) -> list[ExampleTable]:
    """Open the examples of every source, memory-mapped, and report their sizes and notices.

    Args:
        config: The sources.
        cache: Folder for converted sources.
        reporter: Receives progress and messages.
        mined: Whether hard negatives are mined, so that no source needs any. Default: False.

    Raises:
        ConfigError: If there is no source.
        InputError: If a source is missing, broken or empty, or if negatives are requested and no source has any.
    """
    if not config.sources:
        raise ConfigError("data.sources: expected at least one source of training pairs, found none")
    tables = []
    for source in config.sources:
        with reporter.bar(f"read {source.path}", None, "rows") as advance:
            table = open_source(source, cache, progress=advance)
        reporter.line(f"{source.path}: {len(table):,} examples")
        for notice in table.notices:
            reporter.line(f"{source.path}: {notice}")
        tables.append(table)
    if config.negatives and not mined and not any(table.rows_with_negatives for table in tables):
        raise InputError(f"data.negatives: expected a source with negatives ({config.negatives} per query), found none")
    return tables


def open_batches(
    config: TrainConfig,
    tables: list[ExampleTable],
    towers: Towers,
    token_budget: int,
    share: Share | None = None,
    known: KnownPositives | None = None,
    clusters: Sequence[Sequence[Integers]] | None = None,
    corpus: CorpusTable | None = None,
) -> BatchDataset[PreparedBatch]:
    """Return the batches of a run as a dataset, which tokenizes them on access.

    Args:
        config: Configuration of the run.
        tables: The examples of each source.
        towers: The towers, whose tokenizers are used.
        token_budget: Largest number of tokens in a micro-batch.
        share: Rank and number of ranks. Default: None, a single rank.
        known: Positives of the queries with several positives. Default: None: false negatives are found only from the
            pairs of the batch.
        clusters: For each source the rows of each topic cluster. Default: None, batches are random rows of a source.
        corpus: Corpus of random passages. Default: None.

    Raises:
        InputError: If a source has too few rows for a batch, or a prompt takes up all tokens of a text.
    """
    sources = config.data.sources
    settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "weights": [source.weight for source in sources],
        "temperature": config.data.temperature,
        "epochs": None if config.steps else config.epochs,
        "steps": config.steps,
        "names": [source.path for source in sources],
        "processes": 1 if share is None else share.size,
    }
    schedule: BatchSchedule | MixedSchedule | ClusteredSchedule
    if clusters is not None:
        schedule = ClusteredSchedule(clusters, **settings)
    elif config.data.mix != "steps" and len(tables) > 1:
        schedule = MixedSchedule([len(table) for table in tables], **settings)
    else:
        schedule = BatchSchedule([len(table) for table in tables], **settings)
    prompts = source_prompts(towers, sources)
    for source_prompt, table in zip(prompts, tables, strict=True):
        queries, passages = table.prompts()
        for prompt in (source_prompt.query, *queries):
            towers.check_prompt(prompt, "query")
        for prompt in (source_prompt.passage, *passages):
            towers.check_prompt(prompt, "document")
    return BatchDataset(
        tables,
        schedule,
        BatchPreparer.of(
            towers,
            token_budget,
            queries_only=bool(config.query_only),
            keep_texts=config.loss.statistics == "texts",
        ),
        prompts=prompts,
        passages=PassageSettings(
            config.data.positives, config.data.max_positives, config.data.negatives, config.data.negatives_seen_by
        ),
        known=known,
        share=share,
        separate_blocks=config.data.mix == "blocks",
        corpus=corpus,
        random_passages=config.data.random_passages,
    )
