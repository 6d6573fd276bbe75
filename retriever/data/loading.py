"""From a run's configuration to its batches: sources opened, planned and tokenized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from index.files import InputError
from index.progress import Reporter
from retriever.config.run import DataConfig, TrainConfig
from retriever.data.batches import BatchDataset
from retriever.data.known_positives import KnownPositives, find_known_positives
from retriever.data.micro_batches import BatchPreparer, PreparedBatch
from retriever.data.schedule import BatchSchedule
from retriever.data.source_prompts import describe_source_prompts, source_prompts
from retriever.data.table import ExampleTable, open_source
from retriever.distributed.share import Share
from retriever.errors import ConfigError
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
) -> tuple[Any, tuple[str, ...]]:
    """The batches of a run, of texts or of pictures and captions, and what identifies each source.

    They have a length, the number of steps, and a `loader(start=, workers=)` of PreparedBatch: of each batch the
    `share` of one process, or the whole. Of a run that is only `planned` nothing long is computed.

    Raises:
        InputError: a source is missing or broken, or does not fit the model.
    """
    if config.model.image.name:
        from retriever.data.images.loading import open_image_batches
        from retriever.models.images.towers import ImageTextTowers

        assert isinstance(towers, ImageTextTowers)
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
        raise ConfigError("data.images: pictures need an image tower: set model.image.name")
    tables = open_tables(config.data, cache, reporter)
    known = find_known_positives(tables, cache, reporter) if config.loss.masks_false_negatives else None
    batches = open_batches(config, tables, towers, token_budget, share, known)
    for line in [*batches.schedule.lines(), *describe_source_prompts(towers, config.data.sources)]:
        reporter.line(line)
    return batches, tuple(table.sha256 for table in tables)


def open_tables(config: DataConfig, cache: Path, reporter: Reporter) -> list[ExampleTable]:
    """The examples of every source, memory-mapped; their sizes and counted warnings are shown.

    Raises:
        InputError: there is no source, one is missing, broken or empty, or negatives are asked for and none has any.
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
    if config.negatives and not any(table.rows_with_negatives for table in tables):
        raise InputError(f"data.negatives: {config.negatives} a query asked for, but no source has any")
    return tables


def open_batches(
    config: TrainConfig,
    tables: list[ExampleTable],
    towers: Towers,
    token_budget: int,
    share: Share | None = None,
    known: KnownPositives | None = None,
) -> BatchDataset[PreparedBatch]:
    """Every batch of the run, in order; tokenized when it is taken.

    Args:
        known: of queries that have several positives, all of them; otherwise only the pairs of a batch are known.

    Raises:
        InputError: a source has too few rows for a batch, or a prompt that leaves no room for texts.
    """
    sources = config.data.sources
    schedule = BatchSchedule(
        [len(table) for table in tables],
        batch_size=config.batch_size,
        seed=config.seed,
        weights=[source.weight for source in sources],
        epochs=None if config.steps else config.epochs,
        steps=config.steps,
        names=[source.path for source in sources],
        processes=1 if share is None else share.size,
    )
    prompts = source_prompts(towers, sources)
    for given in prompts:
        towers.check_prompt(given.query, "query")
        towers.check_prompt(given.passage, "document")
    preparer = BatchPreparer.of(towers, token_budget)
    return BatchDataset(
        tables,
        schedule,
        preparer,
        prompts=prompts,
        negatives_per_query=config.data.negatives,
        known=known,
        share=share,
    )
