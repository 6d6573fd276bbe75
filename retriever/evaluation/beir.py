"""Evaluation of a model on one split of a BEIR set: encode, search, score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from index.beir import BeirDataset
from index.progress import Reporter
from retriever.distributed.ranks import Ranks
from retriever.encoding.corpus import StoreOptions
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.files import embed_corpus, embed_queries, ticking
from retriever.models.towers import Towers

if TYPE_CHECKING:
    from eval.metrics import Metrics
    from eval.ranking import RankedRun

# Passages per window, and per shard if ranks share the work: small, so that every rank gets a part of small corpora.
WINDOW = 8192


def evaluate_towers(
    towers: Towers,
    dataset: BeirDataset,
    embeddings: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    k: int = 1000,
    tick: Callable[[], None] | None = None,
    ranks: Ranks | None = None,
    keep_identical_ids: bool = False,
    same_model: bool = False,
) -> tuple[RankedRun, Metrics]:
    """Embed the corpus of a BEIR set into a store, search it exactly and compute the metrics of the split.

    Args:
        towers: the model in evaluation mode, on the device to use.
        dataset: the split.
        embeddings: the folder of the store, which is continued or reused if it exists.
        options: precision and micro-batch size.
        reporter: shows progress.
        k: passages per query in the run.
        tick: called after every micro-batch; may raise to stop the evaluation.
        ranks: ranks that share the work, each of which calls with the same arguments. The result is that of one
            process. Default: None, one process.
        keep_identical_ids: keep passages that have the id of their query.
        same_model: see `encode_passages`.

    Returns:
        The run and its metrics.
    """
    # Imported here, because a training run without a dev set does not need the package eval.
    from eval.evaluate import evaluate_beir
    from eval.metrics import KS

    is_distributed = ranks is not None and ranks.world_size > 1
    # One process uses the same windows as several, so that the vectors are bitwise equal.
    storage = StoreOptions(shard_rows=WINDOW, window=WINDOW) if is_distributed else StoreOptions(window=WINDOW)
    store = embed_corpus(
        towers,
        dataset.corpus_file,
        embeddings,
        options,
        reporter,
        storage=storage,
        tick=tick,
        ranks=ranks,
        same_model=same_model,
    )
    with reporter.bar(f"{dataset.name}: search", store.rows, "passages") as advance:
        return evaluate_beir(
            dataset,
            store=store,
            embed_queries=lambda texts: embed_queries(towers, texts, options, reporter, tick=tick),
            k=k,
            ks=KS,
            device=str(towers.device),
            progress=ticking(advance, tick),
            on_ranks=is_distributed,
            keep_identical_ids=keep_identical_ids,
        )
