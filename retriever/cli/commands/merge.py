"""`retriever merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from index.progress import Reporter
from retriever.cli.commands.common import Switch, answer


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge models of the same architecture into one, with weights that are given or chosen on a dev set."""

    models: tuple[str, ...]
    """Two or more model folders or hub names. Prompts and maximum lengths are those of the first one."""
    out: str
    """Folder of the merged model, with merge.json and merge.md about its sources."""
    method: Literal["linear", "slerp"] = "linear"
    """linear: a weighted mean. slerp: spherical interpolation of each tensor; of more than two models one after
    another."""
    weights: tuple[float, ...] = ()
    """Weight of each model; the weights are divided by their sum. Empty: equal weights, or with --dev those that are
    best on the dev sets."""
    dev: tuple[str, ...] = ()
    """Dev sets for choosing the weights by the mean score: BEIR folders, or zero-shot sets for image–text models. The
    models are merged one by one, from the best to the worst, each with the share that gives the best score."""
    split: str = "dev"
    """Split of the dev sets."""
    max_queries: int | None = None
    """Number of queries of each dev set, the first ones sorted by id. None: all queries."""
    grid: int = 10
    """Number of steps between the shares 0 and 1 that are tried."""
    device: str = "auto"
    """Device of the evaluation: cpu, cuda, cuda:1 …; auto: CUDA if there is a GPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the evaluation."""
    micro_batch_tokens: int | None = None
    """Maximum number of tokens per forward pass, including padding. None: 4096 on a CPU; on a GPU, up to 262144 as its
    free memory allows."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self, reporter: Reporter) -> int:
        from retriever.selection.merge import merge

        merged = merge(
            self.models,
            self.out,
            method=self.method,
            weights=self.weights or None,
            dev=self.dev or None,
            split=self.split,
            max_queries=self.max_queries,
            grid=self.grid,
            device=self.device,
            precision=self.precision,
            micro_batch_tokens=self.micro_batch_tokens,
            progress=reporter,
        )
        shown = {"out": str(merged.folder), "weights": merged.weights}
        score = {} if merged.score is None else {merged.metric: round(merged.score, 4)}
        answer(self.json, {**shown, **score})
        return 0
