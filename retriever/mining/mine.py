"""The public function `retriever.mine`, which finds hard negatives for the queries of a training source."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from index.ann.gpu.search import Spread
from index.beir import BeirDataset, beir_file
from index.files import InputError, sha256_file
from index.manifest import NAME
from index.progress import Progress, Reporter, SilentReporter, as_reporter
from index.store.reader import EmbeddingStore
from retriever.config.sources import PairFormat, SourceConfig
from retriever.data.sources import resolve_format
from retriever.data.table import ExampleTable, open_source
from retriever.distributed.context import joined_ranks, rank_device, same_settings
from retriever.encoding.corpus import StoreOptions
from retriever.encoding.files import Tick, embed_corpus
from retriever.encoding.model import Model, ModelInput, load
from retriever.encoding.window_workers import workers_for
from retriever.errors import ArgumentError, check_at_least, check_choice, check_numbers, check_paths
from retriever.mining.corpus import Corpus, IndexCorpus, StoreCorpus, write_union
from retriever.mining.cross_encoder import CrossEncoderScorer
from retriever.mining.miner import Miner, prompts_of
from retriever.mining.options import MiningOptions, Sampling
from retriever.mining.parts import PART_ROWS, Part, Workplace, example_line
from retriever.mining.texts import KnownPairs, text_key
from retriever.utils.device import PrecisionChoice
from retriever.utils.indexes import check_index_options, open_indexes, place_index

CROSS_ENCODER_PART_ROWS = 2**12


@dataclass(frozen=True)
class MinedNegatives:
    """What `retriever.mine` returns.

    Attributes:
        path: The JSON lines file; it can be a training source without changes.
        queries: Number of rows written, one for each row of the source that has a positive left.
        with_fewer_negatives: Number of rows with fewer negatives than requested.
        dropped_pairs: Number of pairs that `keep_top` has dropped.
    """

    path: Path
    queries: int
    with_fewer_negatives: int
    dropped_pairs: int = 0


def mine(
    model: ModelInput,
    data: str | Path | SourceConfig,
    out: str | Path,
    *,
    corpus: str | Path | None = None,
    index: str | Path | None = None,
    embeddings: str | Path | None = None,
    split: str = "train",
    format: PairFormat = "auto",
    query_column: str = "query",
    positive_column: str = "positive",
    negatives_column: str = "negatives",
    negatives: int = 7,
    depth: int = 100,
    skip: int = 0,
    max_share: float | None = 0.95,
    margin: float | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    sampling: Sampling = "top",
    seed: int = 0,
    cross_encoder: str | Path | None = None,
    keep_top: int | None = None,
    keep_identical_ids: bool = False,
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    micro_batch_tokens: int | None = None,
    index_device: str = "auto",
    index_spread: Spread = "auto",
    progress: Progress = None,
) -> MinedNegatives:
    """Find hard negatives: passages that a model scores high for a query and that no row pairs with it.

    Candidates that score above `max_share` of the row's best positive are dropped, because many of them are unjudged
    positives (NV-Retriever, arXiv 2407.15831). The file has the rows of the source, with the columns query, positive
    (a list), negatives (a list, hardest first) and scores (of the positives, then of the negatives).

    With `keep_top`, pairs are filtered as well: a pair is kept only if its passage is among the best of its query
    (consistency filtering, Dai et al., arXiv 2209.11755).

    An interrupted call can be repeated: it continues from the folder OUT.work. Under torchrun every process calls this
    function, and the processes share the work.

    Args:
        model: A model from `retriever.load`, or its folder or hub name.
        data: A BEIR folder, a .jsonl, .csv, .tsv or .parquet file, a folder of a Hugging Face dataset, or, with format
            "huggingface", a hub name; or a `SourceConfig`, whose fields replace the arguments about the source.
        out: The .jsonl file to write.
        corpus: Where to search: a BEIR folder (its corpus) or a file of passages. Default: None, the corpus of a BEIR
            folder, otherwise all positives and negatives of the source.
        index: Folder of an index of the model's embeddings to search instead. Default: None, exact search.
        embeddings: Store of the corpus's embeddings, continued or reused. With an index, the store that it was built
            from, for exact scores. Default: None, a temporary one.
        split: Split of a BEIR folder or a Hugging Face dataset. Default: "train".
        format: Format of the source. Default: "auto".
        query_column: Column of the query. Default: "query".
        positive_column: Column of the positive or a list of positives. Default: "positive".
        negatives_column: Column of hard negatives, which are further passages to search. Default: "negatives".
        negatives: Maximum number of negatives per row; 0 writes none. Default: 7.
        depth: Candidates per query, those of highest score. Default: 100.
        skip: Number of best candidates that are skipped. Default: 0.
        max_share: Share of the best positive's score that a negative may have, in (0, 1]. Default: 0.95.
        margin: Least distance of a negative's score to the best positive's. Default: None.
        max_score: Highest score of a negative. Default: None.
        min_score: Lowest score of a negative. Default: None.
        sampling: "top" takes the candidates of highest score, "random" a random choice. Default: "top".
        seed: Seed of the random choice. Default: 0.
        cross_encoder: Folder or hub name of a cross-encoder, with @revision or without, whose scores replace those of
            the model after the candidates are found, in the limits, the order and the file. Default: None.
        keep_top: Keep a pair only if its passage is among this many best texts of its query by the model, other
            positives not counted. Default: None, all pairs are kept.
        keep_identical_ids: Whether passages of a BEIR folder that have their query's id and are not judged for it are
            candidates. Default: False.
        device: Device, if `model` is a folder or name. Default: "auto".
        precision: As for `retriever.load`, if `model` is a folder or name; also that of the cross-encoder.
        micro_batch_tokens: As for `retriever.load`, if `model` is a folder or name.
        index_device: Where the index is searched: "cpu", "cuda:1" and so on, or "cuda" for all GPUs. Default: "auto",
            the GPU of the model if there is one and it can search the index, otherwise the CPU.
        index_spread: How several GPUs are used: "shards" or "replicas". Default: "auto", one GPU if it holds the index,
            else shards.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The file and the number of rows in it.

    Raises:
        InputError: The data or the model cannot be read.
        ConfigError: An argument is invalid.
    """
    check_paths(out=out, **({} if isinstance(data, SourceConfig) else {"data": data}))
    paths = {"corpus": corpus, "index": index, "embeddings": embeddings, "cross_encoder": cross_encoder}
    check_paths(**{name: path for name, path in paths.items() if path is not None})
    if not isinstance(model, Model):
        check_paths(model=model)
    check_choice(get_args(PairFormat), format=format)
    check_choice(get_args(Sampling), sampling=sampling)
    numbers = {"max_share": max_share, "margin": margin, "max_score": max_score, "min_score": min_score}
    check_numbers(**{name: value for name, value in numbers.items() if value is not None})
    check_index_options(index_device, index_spread, index=index is not None)
    check_at_least(0, negatives=negatives, skip=skip, seed=seed)
    check_at_least(1, depth=depth, **({} if keep_top is None else {"keep_top": keep_top}))
    if max_share is not None and not 0 < max_share <= 1:
        raise ArgumentError("max_share", f"expected more than 0 and at most 1, found {max_share}")
    if index is not None and corpus is not None:
        raise ArgumentError("corpus", "leave it out with index, whose passages are searched")
    out = Path(out)
    if out.suffix != ".jsonl":
        raise ArgumentError("out", f"expected a .jsonl file, found {out}")
    if out.is_dir():
        raise ArgumentError("out", f"expected a file, found the folder {out}")
    options = MiningOptions(
        negatives, depth, skip, max_share, margin, max_score, min_score, sampling, seed, keep_top, keep_identical_ids
    )
    source = data
    if not isinstance(source, SourceConfig):
        source = SourceConfig(
            str(source),
            format=format,
            split=split,
            query=query_column,
            positive=positive_column,
            negatives=negatives_column,
            # They are replaced.
            scores="",
        )
    if source.passage_prompt_column is not None:
        raise ArgumentError("data", "expected a source without passage_prompt_column: a passage has one embedding")
    if isinstance(model, Model):
        device, precision = str(model.device), model.options.precision
        micro_batch_tokens = model.options.micro_batch_tokens
    given = {**asdict(options), "precision": precision, "micro_batch_tokens": micro_batch_tokens}
    with joined_ranks(same_settings("mine", device, given)) as ranks:
        reporter = as_reporter(progress) if ranks.is_first else SilentReporter()
        if not isinstance(model, Model):
            model = load(
                model, device=device, precision=precision, micro_batch_tokens=micro_batch_tokens, progress=reporter
            )
        model.towers.to(rank_device(model.device))
        places = Places(
            None if corpus is None else Path(corpus),
            None if index is None else Path(index),
            None if embeddings is None else Path(embeddings),
            None if cross_encoder is None else str(cross_encoder),
            index_device,
            index_spread,
        )
        workplace = Workplace(out, ranks)
        with workplace.removed_if_unused():
            with ranks.first_rank_first(), reporter.bar(f"read {source.path}", None, "rows") as advance:
                table = open_source(source, workplace.folder / "cache", progress=advance)
            for notice in table.notices:
                reporter.line(f"{source.path}: {notice}")
            counts = mine_table(model, source, table, workplace, options, places, reporter)
    return MinedNegatives(out, counts["rows"], counts["short"], counts["dropped"])


@dataclass(frozen=True)
class Places:
    """What is searched, and with which cross-encoder candidates are scored. See `mine` for the fields."""

    corpus: Path | None = None
    index: Path | None = None
    embeddings: Path | None = None
    cross_encoder: str | None = None
    index_device: str = "auto"
    index_spread: Spread = "auto"


def mine_table(
    model: Model,
    source: SourceConfig,
    table: ExampleTable,
    workplace: Workplace,
    options: MiningOptions,
    places: Places,
    reporter: Reporter,
    *,
    same_model: bool = False,
    tick: Tick = None,
) -> Counter[str]:
    """Mine the hard negatives of a table into the file of a workplace. Every rank must call it.

    Args:
        model: The model, on the device to use.
        source: The source of the table.
        table: Its examples.
        workplace: The file to write, with the ranks that share the work.
        options: Which negatives are taken, and which pairs are kept.
        places: What is searched.
        reporter: Shows progress.
        same_model: Whether the models of the ranks have been compared before. Default: False.
        tick: Called after every micro-batch of the corpus; may raise to stop the work. Default: None.

    Returns:
        Counts: "rows" written, "short" rows with fewer negatives than requested, and pairs that are "dropped".
    """
    with prompts_of(source, model.towers):
        return _mine(model, source, table, workplace, options, places, reporter, same_model, tick)


def _mine(
    model: Model,
    source: SourceConfig,
    table: ExampleTable,
    workplace: Workplace,
    options: MiningOptions,
    places: Places,
    reporter: Reporter,
    same_model: bool,
    tick: Tick,
) -> Counter[str]:
    with reporter.bar("read positives", len(table), "rows") as advance:
        known = KnownPairs.of_table(table, advance)
    identical = None
    if resolve_format(source) == "beir" and not options.keep_identical_ids:
        identical = identical_ids(BeirDataset.open(source.path, source.split), reporter)
    scorer = None
    if places.cross_encoder is not None:
        scorer = CrossEncoderScorer(places.cross_encoder, model.device, model.options.precision)
    passages, about = _corpus(model, source, table, places, workplace, reporter, same_model, tick)
    miner = Miner(
        model.towers,
        model.options,
        passages,
        known,
        options,
        identical=identical,
        rescore=None if scorer is None else scorer.scores,
    )
    identity = {
        "options": asdict(options),
        "rows": table.sha256,
        "query_prompt_column": source.query_prompt_column,
        "model": model.towers.fingerprint(),
        "precision": model.options.precision,
        "corpus": about,
        "cross_encoder": places.cross_encoder,
    }

    def mine_part(start: int, stop: int) -> Part:
        mined = miner.mine(table, start, stop, reporter)
        examples = [row.example for row in mined if row.example is not None]
        counts = {
            "rows": len(examples),
            "short": sum(len(example.negatives) < options.negatives for example in examples),
            "dropped": sum(row.dropped for row in mined),
        }
        return Part([example_line(example, source) for example in examples], counts)

    # Pairs of a cross-encoder are held as texts, `depth` for each row.
    part_rows = PART_ROWS if scorer is None else CROSS_ENCODER_PART_ROWS
    return workplace.write(len(table), identity, mine_part, reporter, part_rows=part_rows)


def identical_ids(dataset: BeirDataset, reporter: Reporter) -> KnownPairs:
    """Return the queries with the passages that have their id and are not judged for them; in ArguAna, the queries."""
    pairs = [
        (text_key(dataset.queries[passage.id]), text_key(passage.content))
        for passage in dataset.passages()
        if passage.id in dataset.queries and passage.id not in dataset.qrels.get(passage.id, {})
    ]
    if pairs:
        reporter.line(
            f"{dataset.name}: passages that are not taken as negatives because they have the id of the query and are "
            f"not judged for it: {len(pairs):,} (--keep-identical-ids takes them)"
        )
    queries, passages = np.array(pairs, np.uint64).reshape(-1, 2).T
    return KnownPairs(queries, passages)


def _corpus(
    model: Model,
    source: SourceConfig,
    table: ExampleTable,
    places: Places,
    workplace: Workplace,
    reporter: Reporter,
    same_model: bool,
    tick: Tick,
) -> tuple[Corpus, dict[str, str]]:
    """Open what is searched, embedding it first where needed; and what identifies it."""
    if places.index is not None:
        index = open_indexes([places.index], reporter)
        place_index(index, model.device, reporter, index_device=places.index_device, index_spread=places.index_spread)
        index.check_model(model.towers.fingerprint())
        store = None if places.embeddings is None else EmbeddingStore.open(places.embeddings)
        manifest = sha256_file(places.index / NAME)
        return IndexCorpus(index, store, reporter), {"index": manifest, "exact": str(store is not None)}
    path = places.corpus
    if path is None and resolve_format(source) == "beir":
        path = Path(source.path)
    if path is None:
        path = workplace.folder / "corpus.jsonl"
        with workplace.ranks.first_rank_first():
            if not path.exists():
                with reporter.bar("collect passages", len(table), "rows") as advance:
                    write_union(table, path, advance)
    elif path.is_dir():
        path = beir_file(path, "corpus.jsonl")
    elif not path.exists():
        raise InputError(f"{path}: no such file or folder")
    store = embed_corpus(
        model.towers,
        path,
        places.embeddings or workplace.folder / "embeddings",
        model.options,
        reporter,
        storage=StoreOptions(workers=workers_for(model.device)),
        tick=tick,
        ranks=workplace.ranks,
        same_model=same_model,
    )
    return StoreCorpus(store, model.device, reporter), {key: str(value) for key, value in store.source.items()}
