"""nDCG, MAP, recall, precision and MRR at k, computed by trec_eval itself (through pytrec_eval)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from index.files import InputError

Run = dict[str, dict[str, float]]
"""Query id -> passage id -> score; higher is better."""

Qrels = dict[str, dict[str, int]]
"""Query id -> passage id -> grade; a grade above 0 is relevant."""

KS = (1, 3, 5, 10, 100, 1000)


@dataclass(frozen=True)
class Metrics:
    """What a run scored. Keys are "ndcg@10", "map@100", "recall@100", "precision@10", "mrr@10", …; values in [0, 1]."""

    mean: dict[str, float]
    """Mean of each measure over every query of the qrels."""
    per_query: dict[str, dict[str, float]]
    """Query id -> measure -> value, in the order of the qrels."""
    missing: list[str]
    """Queries of the qrels for which the run has nothing; each counts as 0 in the mean."""


def drop_identical_ids(run: Run) -> Run:
    """The run without passages whose id is their query's own id, as BEIR evaluates (it matters for ArguAna)."""
    return {
        query: {passage: score for passage, score in scores.items() if passage != query}
        for query, scores in run.items()
    }


def trec_order(scores: dict[str, float]) -> list[tuple[str, float]]:
    """(passage id, score) pairs in trec_eval's order: float32 score descending, then id descending.

    trec_eval compares ids by their bytes; the UTF-8 bytes of two texts compare as their code points do.
    """
    import numpy as np

    ids = list(scores)
    rounded = np.fromiter(scores.values(), dtype=np.float64, count=len(ids)).astype(np.float32).tolist()
    return [(passage, scores[passage]) for _, passage in sorted(zip(rounded, ids, strict=True), reverse=True)]


def evaluate_run(qrels: Qrels, run: Run, ks: Sequence[int] = KS, *, drop_identical: bool = True) -> Metrics:
    """Score a run.

    The numbers are trec_eval's with its option -c (Buckley; https://github.com/usnistgov/trec_eval): ties go by
    passage id, descending, scores are compared as float32, unjudged passages count as not relevant, and the mean is
    over every query of the qrels, so that a query the run misses, or one without a relevant passage, counts as 0.
    The `beir` package agrees wherever the run has every query. MRR@k is the reciprocal rank of the first relevant
    passage within the first k of that same order, else 0 (`beir` breaks ties there by the run's own order).

    Args:
        qrels: the judgements; not empty.
        run: the ranked passages; queries that the qrels lack are ignored.
        ks: cut-offs, each at least 1.
        drop_identical: first drop passages whose id is the query's id, as BEIR does.

    Raises:
        ValueError: `ks` is empty or holds a number below 1.
        InputError: the qrels are empty, or a score is not a number.
    """
    import pytrec_eval

    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected cut-offs of at least 1, found {list(ks)}")
    if not qrels:
        raise InputError("qrels: expected at least one judged query, found none")
    _refuse_nan(run)
    judged = {query: scores for query, scores in run.items() if query in qrels}
    if drop_identical:
        judged = drop_identical_ids(judged)
    judged = {query: scores for query, scores in judged.items() if scores}

    cuts = ",".join(str(k) for k in sorted(set(ks)))
    measures = {f"ndcg_cut.{cuts}", f"map_cut.{cuts}", f"recall.{cuts}", f"P.{cuts}", "recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(judged)
    zeros = dict.fromkeys((f"{name}@{k}" for name in ("ndcg", "map", "recall", "precision", "mrr") for k in ks), 0.0)
    per_query = {query: _our_names(found[query], ks) if query in found else dict(zeros) for query in qrels}
    mean = {name: math.fsum(row[name] for row in per_query.values()) / len(per_query) for name in zeros}
    return Metrics(mean, per_query, [query for query in qrels if query not in judged])


def _our_names(values: dict[str, float], ks: Sequence[int]) -> dict[str, float]:
    row = {}
    for ours, theirs in (("ndcg", "ndcg_cut_"), ("map", "map_cut_"), ("recall", "recall_"), ("precision", "P_")):
        row.update({f"{ours}@{k}": values[f"{theirs}{k}"] for k in ks})
    reciprocal = values["recip_rank"]
    # 1/rank of the first relevant passage; it is within the first k when the rank is.
    rank = round(1 / reciprocal) if reciprocal > 0 else math.inf
    row.update({f"mrr@{k}": reciprocal if rank <= k else 0.0 for k in ks})
    return row


def _refuse_nan(run: Run) -> None:
    for query, scores in run.items():
        for passage, score in scores.items():
            if math.isnan(score):
                raise InputError(f"run: expected a number as the score of query {query}, passage {passage}, found NaN")
