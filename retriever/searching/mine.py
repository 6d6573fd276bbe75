"""The public function `retriever.mine`: hard negatives for the queries of a BEIR folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from index.beir import BeirDataset
from index.progress import Progress, as_reporter
from retriever.encoding.model import Model, ModelInput, Precision, load
from retriever.errors import ArgumentError, check_at_least, check_numbers, check_paths
from retriever.searching.mining import MiningOptions, mine_with_towers


@dataclass(frozen=True)
class MinedNegatives:
    """What `retriever.mine` returns.

    Attributes:
        path: The JSON lines file; it can be a training source without changes.
        queries: Number of queries written.
        with_fewer_negatives: Number of queries with fewer negatives than requested.
    """

    path: Path
    queries: int
    with_fewer_negatives: int


def mine(
    model: ModelInput,
    data: str | Path,
    out: str | Path,
    *,
    embeddings: str | Path | None = None,
    split: str = "train",
    negatives: int = 7,
    depth: int = 100,
    max_share: float = 0.95,
    keep_identical_ids: bool = False,
    device: str = "auto",
    precision: Precision = "fp32",
    micro_batch_tokens: int | None = None,
    progress: Progress = None,
) -> MinedNegatives:
    """Find hard negatives: passages that a model scores high for a query and that are not judged relevant.

    Candidates that score above `max_share` of the query's best positive are dropped, because many of them are unjudged
    positives (NV-Retriever, arXiv 2407.15831).

    Args:
        model: A model from `retriever.load`, or its folder or hub name.
        data: BEIR folder.
        out: The .jsonl file, with query, positive and negatives.
        embeddings: Store of the corpus's embeddings, continued or reused. Default: None, a temporary one.
        split: Split of the qrels. Default: "train".
        negatives: Most negatives per query. Default: 7.
        depth: Candidates per query. Default: 100.
        max_share: Share of the best positive's score that a negative may have, in (0, 1]. Default: 0.95.
        keep_identical_ids: Whether passages that have their query's id and are not judged for it are candidates.
            Default: False.
        device: Device, if `model` is a folder or name. Default: "auto".
        precision: As for `retriever.load`, if `model` is a folder or name.
        micro_batch_tokens: As for `retriever.load`, if `model` is a folder or name.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The file and the number of queries in it.

    Raises:
        InputError: The data or the model cannot be read.
        ConfigError: An argument is invalid.
    """
    check_paths(data=data, out=out)
    if embeddings is not None:
        check_paths(embeddings=embeddings)
    if not isinstance(model, Model):
        check_paths(model=model)
    check_numbers(max_share=max_share)
    out = Path(out)
    check_at_least(1, negatives=negatives, depth=depth)
    if out.suffix != ".jsonl":
        raise ArgumentError("out", f"expected a .jsonl file, found {out}")
    if out.is_dir():
        raise ArgumentError("out", f"expected a file, found the folder {out}")
    if not 0 < max_share <= 1:
        raise ArgumentError("max_share", f"expected more than 0 and at most 1, found {max_share}")
    reporter = as_reporter(progress)
    if not isinstance(model, Model):
        model = load(
            model, device=device, precision=precision, micro_batch_tokens=micro_batch_tokens, progress=reporter
        )
    queries, short = mine_with_towers(
        model.towers,
        BeirDataset.open(data, split),
        out,
        model.options,
        reporter,
        mining=MiningOptions(negatives, depth, max_share, keep_identical_ids),
        embeddings=None if embeddings is None else Path(embeddings),
    )
    return MinedNegatives(out, queries, short)
