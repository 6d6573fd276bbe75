"""Towers on one BEIR split: encode, search, score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from index.beir import BeirDataset
from index.progress import Reporter
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.files import embed_corpus, embed_queries, ticking
from retriever.models.towers import Towers

if TYPE_CHECKING:
    from eval.metrics import Metrics
    from eval.ranking import RankedRun

# Passages of a shard that ranks share out, small enough for small corpora.
SHARED = 8192


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
    """Embed a BEIR corpus to the store `embeddings` (continued or reused if it is there) and score the split.

    Args:
        towers: in evaluation mode, on the device to use.
        k: passages a query in the run.
        tick: called after every micro-batch; may raise to end the evaluation.
        ranks: share the work, called with the same arguments; the result is that of one process.
        keep_identical_ids: leave no passage out for having its query's id.
        same_model: as in `encode_passages`.
    """
    # Here, because only a run of training with a dev set needs the package eval.
    from eval.evaluate import evaluate_beir
    from eval.metrics import KS

    several = ranks is not None and ranks.world_size > 1
    store = embed_corpus(
        towers,
        dataset.corpus_file,
        embeddings,
        options,
        reporter,
        # A window is the least that one rank embeds; those of one process are the same.
        shard_rows=SHARED if several else 65536,
        window=SHARED,
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
            on_ranks=several,
            keep_identical_ids=keep_identical_ids,
        )
