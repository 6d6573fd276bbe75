"""Checks of `positives`, `negatives` and `statistics`, and the checked form that the implementations take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from losses.checks import FLOAT_DTYPES, can_check_values, check_bool
from losses.inputs import CheckedOptions, ContrastiveBatch, check_pairs_inside, checked_pairs
from losses.option_checks.combinations import MASKED, given_options
from losses.options import Guide, Negatives, Positives


def with_options(
    batch: ContrastiveBatch,
    positives: Positives | None,
    negatives: Negatives | None,
    statistics: bool,
    *,
    shard: bool = False,
) -> ContrastiveBatch:
    """The batch with its checked options; the batch itself if none needs sums over negatives alone.

    Args:
        shard: Whether the batch is one rank's shard. Then `check_positive_pairs` is called when the size of the pool
            is known.

    Raises:
        ValueError: If an argument is invalid. The message begins with its name.
    """
    check_bool("statistics", statistics)
    options = CheckedOptions(statistics=statistics)
    wanted = given_options(positives, negatives, statistics) & set(MASKED)
    if positives is not None:
        if not isinstance(positives, Positives):
            raise ValueError(f"positives must be a Positives, found {type(positives).__name__}")
        pairs = checked_pairs("positives.pairs", positives.pairs, batch.query)
        options = replace(options, pairs=pairs, reduction=positives.reduction)
    if negatives is not None:
        if not isinstance(negatives, Negatives):
            raise ValueError(f"negatives must be a Negatives, found {type(negatives).__name__}")
        options = replace(options, limit=negatives.limit, hardness=float(negatives.hardness))
        if negatives.guide is not None:
            query, passage = checked_guide(negatives.guide, batch)
            margin = float(negatives.guide.margin)
            options = replace(options, guide_query=query, guide_passage=passage, guide_margin=margin)
    if not wanted:
        return batch
    batch = replace(batch, options=options)
    if not shard:
        check_positive_pairs(batch, len(batch.passage))
    return batch


def needs_negatives(options: CheckedOptions) -> bool:
    """Whether the options change the loss, and not only ask for statistics."""
    given = (options.limit, options.guide_query)
    return options.reduction != "single" or options.hardness != 0 or any(each is not None for each in given)


def checked_guide(guide: Guide, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """The guide's embeddings of queries and passages, in the query's dtype.

    Raises:
        ValueError: If they are not matrices of floating-point numbers with a row for each query and passage.
    """
    for name, tensor, side in (("query", guide.query, batch.query), ("passage", guide.passage, batch.passage)):
        name = f"negatives.guide.{name}"
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, found {type(tensor).__name__}")
        if tensor.dim() != 2 or len(tensor) != len(side) or not tensor.shape[1]:
            raise ValueError(f"{name} must have shape [{len(side)}, dimensions], found {list(tensor.shape)}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, found {tensor.dtype}")
        if tensor.device != side.device:
            raise ValueError(f"{name} is on {tensor.device}, query is on {side.device}")
    if guide.query.shape[1] != guide.passage.shape[1]:
        raise ValueError(
            f"negatives.guide.passage has {guide.passage.shape[1]} dimensions, negatives.guide.query has "
            f"{guide.query.shape[1]}"
        )
    dtype = batch.query.dtype
    return guide.query.detach().to(dtype), guide.passage.detach().to(dtype)


def check_positive_pairs(batch: ContrastiveBatch, passages: int) -> None:
    """Check the values of `positives.pairs` and `excluded` on the CPU; `passages` is the size of the pool.

    Raises:
        ValueError: If a pair is outside the score matrix, or a further positive is excluded.
    """
    pairs = batch.options.pairs if batch.options is not None else None
    if pairs is None or not can_check_values(pairs):
        return
    check_pairs_inside("positives.pairs", pairs, len(batch.query), passages)
    if batch.excluded is None:
        return
    both = torch.isin(pair_keys(batch.excluded, passages), pair_keys(pairs, passages))
    if both.any():
        raise ValueError(f"excluded must not hold a pair of positives, found {batch.excluded[both][0].tolist()}")


def options_to_compare(options: CheckedOptions | None) -> tuple[Any, ...]:
    """What of the options must be the same on all ranks."""
    if options is None:
        return ()
    guide = None if options.guide_query is None else (options.guide_query.shape[1], options.guide_margin)
    return options.reduction, options.limit, guide, options.hardness, options.statistics


def pair_keys(pairs: Tensor, passages: int) -> Tensor:
    """[R] int64: one number for each pair (query row, passage row), ordered by row and then by column."""
    return pairs[:, 0] * passages + pairs[:, 1]


def with_nan_for_invalid_positives(batch: ContrastiveBatch, passages: int) -> ContrastiveBatch:
    """Set logit_scale, and thereby the loss, to NaN if a positive is invalid, or a pair of `positives` is excluded.

    For values on a GPU, which are not checked on the host. `passages` is the size of the pool.
    """
    options = batch.options
    if options is not None and batch.given_positive is not None and not can_check_values(batch.given_positive):
        positive = batch.given_positive.clamp(0, passages - 1)
        scale = torch.where((positive != batch.given_positive).any(), torch.nan, batch.logit_scale)
        batch = replace(batch, given_positive=positive, logit_scale=scale)
    if options is None or options.pairs is None or can_check_values(options.pairs):
        return batch
    if not len(batch.query):
        return replace(batch, options=replace(options, pairs=None), logit_scale=batch.logit_scale * torch.nan)
    rows, columns = options.pairs.unbind(1)
    inside = torch.stack([rows.clamp(0, len(batch.query) - 1), columns.clamp(0, passages - 1)], 1)
    wrong = (inside != options.pairs).any()
    if batch.excluded is not None:
        known = pair_keys(inside, passages).sort().values
        keys = pair_keys(batch.excluded, passages)
        found = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        wrong = wrong | (known[found] == keys).any()
    scale = torch.where(wrong, torch.nan, batch.logit_scale)
    return replace(batch, options=replace(options, pairs=inside), logit_scale=scale)
