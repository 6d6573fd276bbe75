"""InfoNCE with in-batch and hard negatives: the public function and the choice of implementation."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from losses.checks import check_choice, checked_workspace
from losses.distributed.api import Exchange, distributed_batch, loss_over_ranks, uses_kernels
from losses.distributed.local import loss_of_one_process
from losses.inputs import ContrastiveBatch, checked_batch, with_nan_for_invalid_pairs
from losses.masked.combined import combined_loss, is_combined, lists_of_one_process, lists_over_ranks
from losses.masked.compiled import compiled_negatives_loss
from losses.masked.loss import negatives_loss, negatives_loss_over_ranks
from losses.negatives.inputs import FurtherNegatives, checked_further, with_nan_for_invalid_negatives
from losses.negatives.terms import with_further_terms, with_terms_over_ranks
from losses.option_checks.combinations import check_combination, given_options
from losses.option_checks.masked import needs_negatives, with_nan_for_invalid_positives, with_options
from losses.option_checks.objective import checked_objective
from losses.options import Matryoshka, Negatives, Positives, Statistics, Teacher, TeacherScores
from losses.precision import Precision, resolve_precision
from losses.reference import full_matrix_loss, full_matrix_negatives_loss, full_matrix_objective
from losses.torch_tiles.compiled import compiled_tiled_loss
from losses.torch_tiles.inf_cl import tiled_loss
from losses.triton.dense import dense_loss, dense_loss_and_statistics, fits_dense
from losses.triton.inf_cl import fused_loss
from losses.triton.launch import warn_fallback, why_not_dense, why_not_fused

Implementation = Literal["auto", "full", "dense", "chunked", "triton"]


@overload
def inf_cl_loss(
    query: Tensor, passage: Tensor, *, statistics: Literal[True], **options: Any
) -> tuple[Tensor, Statistics]: ...


@overload
def inf_cl_loss(query: Tensor, passage: Tensor, *, statistics: Literal[False] = False, **options: Any) -> Tensor: ...


@overload
def inf_cl_loss(
    query: Tensor, passage: Tensor, *, statistics: bool, **options: Any
) -> Tensor | tuple[Tensor, Statistics]: ...


def inf_cl_loss(  # type: ignore[misc]  # The overloads only say what is returned.
    query: Tensor,
    passage: Tensor,
    *,
    logit_scale: float | Tensor,
    positive: Tensor | None = None,
    positives: Positives | None = None,
    excluded: Tensor | None = None,
    negatives: Negatives | None = None,
    statistics: bool = False,
    matryoshka: Matryoshka | None = None,
    teacher: Teacher | TeacherScores | None = None,
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    passage_ids: Tensor | None = None,
    group: Any = None,
    precision: Precision = "auto",
    implementation: Implementation = "auto",
    exchange: Exchange = "auto",
    workspace_mib: float = 256,
) -> Tensor | tuple[Tensor, Statistics]:
    """InfoNCE loss with memory linear in the batch size.

    The loss is InfoNCE (van den Oord et al., arXiv 1807.03748). The score matrix is computed in tiles and never
    stored, as in Inf-CL (Cheng et al., arXiv 2410.17243).

    Let S = logit_scale · Q Kᵀ [M, N] and let p(i) be the row of query i's positive in `passage`. The row loss of query
    i is log Σ_j exp(S_ij) − S_i,p(i). The loss is the mean of the row losses over queries. With `symmetric`, the
    column loss log Σ_i' exp(S_i',p(i)) − S_i,p(i) is also averaged over queries, and the loss is half the sum of the
    two means.

    All options work with `excluded`, ids, `symmetric` and groups. Two options that do not combine are refused; the
    table in losses/README.md says which.

    Args:
        query: [M, D] query embeddings, in float32, bfloat16, float16 or float64. float64 embeddings are computed in
            float64.
        passage: [N, D] passage embeddings, of the same dtype and on the same device as `query`. A passage that is the
            positive of no query is a hard negative: in the row loss it is a negative of every query.
        logit_scale: 1 / temperature, as a number or a 0-dim floating-point tensor. A tensor that requires a gradient
            receives one.
        positive: [M] integers, the row of each query's positive in `passage`. Default: 0, …, M − 1. Queries may share
            a positive.
        positives: Further positives of queries, beside `positive`: pairs and how they are combined (`Positives`).
            Default: None, one positive per query.
        excluded: [R, 2] integers, pairs (query row, passage row) that are removed from S in both directions, for
            example known positives that are not in `positive`. Pairs may be in any order and may repeat. A query's own
            positive may not be excluded. Costs 8 bytes per pair. Default: None.
        negatives: What counts as a negative of a query (`Negatives`). Default: None, every passage but its positive,
            equally.

            In the batch, `limit` and `guide` remove negatives that are probably false, in both directions, and
            `hardness` weights negatives by their score.

            `own`, `frozen` and `same_side` add negatives that are not in `passage`: terms of the row sums
            Σ_j exp(S_ij). They have no part in the column loss, and `limit` and `guide` do not apply to them.

            `own`: hard negatives that each query has for itself, of the dtype and on the device of `query`; they
            receive a gradient.

            `frozen`: [F, D] passages that are negatives of every query and receive no gradient. A tensor on the device
            of `query`, or on the host, from where blocks are copied to the device while the previous block is used,
            fastest from pinned memory. Or a reader with `rows`, `dim` and `shards()`, an iterator of (first row,
            array [n, D]), such as the reader of an embedding store. Another dtype is converted block by block.
            Forward reads each passage once, backward none. Pairs (query row, frozen row) of `frozen_excluded` are
            removed.

            `same_side`: each query has a single partition function Z_i (GTE, Li et al., arXiv 2308.03281, equation 6),
            and the loss is the mean of log Z_i − S_i,p(i). Let k_p(i) be the positive of query i.

            - Z_i = Σ_j exp(S_ij) + Σ_{i' ≠ i} exp(logit_scale · q_i · q_i'), and the terms of `own` and `frozen`;
            - with `symmetric` also + Σ_i' exp(S_i',p(i)) + Σ_{j ≠ p(i)} exp(logit_scale · k_p(i) · k_j), which is
              equation 6; there the positive's score counts twice.

            Hard negatives in `passage` are passages in each of these sums. With ids, queries with equal ids are
            removed from the query–query terms, and passages with equal ids from the passage–passage terms. `excluded`
            removes entries of S only.

            With a group, `guide`, `own` and `frozen_excluded` are those of this rank's rows. Give every rank all
            frozen passages, not a shard of them. `same_side` has the queries and passages of all ranks.
        statistics: Whether to return statistics of the rows of S too: ranks, hardest negatives, entropies. They take no
            synchronization with the device and no product; with a `Teacher`, `same_side` or `matryoshka`, they take a
            forward of their own. Default: False.
        matryoshka: Prefix sizes whose losses are added up (`Matryoshka`). One product gives the scores of all sizes,
            unless it is combined with options other than `excluded` and ids. Default: None, the loss of the whole
            embeddings.
        teacher: Distillation from another model's embeddings (`Teacher`) or from given scores (`TeacherScores`). With
            a group, each rank gives those of its own rows, and `TeacherScores.passages` are rows of the pool. For CUDA
            tensors, a row outside the pool makes the loss NaN. Default: None.
        symmetric: Whether to add the column loss. Default: False.
        query_ids: [M] integers. Default: `passage_ids[positive]`. Requires `passage_ids`.
        passage_ids: [N] integers. Entry (i, j) is removed from S in both directions if passage_ids[j] == query_ids[i]
            and j != positive[i], so a passage with the same id as a query is not one of its negatives. An entry (i',
            positive[i']) is never masked: queries that share one row as their positive are negatives of each other in
            that column. To avoid this, give each query its own row and the rows equal ids. Default: None, no masking
            by ids.
        group: A `torch.distributed` process group whose ranks each hold a shard of one batch, or None for the loss of
            this process alone. Default: None. Rank r holds M_r queries and N_r passages. The sizes may differ between
            ranks and may be zero; an empty shard has shape [0, D] and the same `requires_grad` as on the other ranks.
            The pool is the concatenation of the passages in rank order, and all passages are negatives of all queries.

            `positive` [M_r] holds rows of the pool; its default is this rank's own passages in order. `excluded` holds
            rows of this rank's queries and rows of the pool. Ids are compared across ranks. `query_ids` defaults to
            the ids of the positives, on whichever rank they are.

            The value is the mean over the queries of all ranks and is the same on every rank. Gradients, including
            that of `logit_scale`, are W times this rank's contribution: averaging them over ranks, as DDP does, gives
            the gradient of the whole batch. Every rank must call forward and backward. Memory is O((M + N) · D / W);
            `losses/distributed/ring.py` counts the bytes sent. Arguments are compared on the host, so a group on GPUs
            should also have a gloo backend ("cpu:gloo,cuda:nccl"); otherwise the host waits for the device.
        precision: Precision of the operands of the matrix products. Sums are always accumulated in float32. "fp32":
            float32; the Triton kernels compute scores from three tf32 products of split operands. "tf32": allows
            CUDA's tf32 products here, whatever the global setting. "bf16": rounds operands to bfloat16. "auto":
            follows the dtype of the embeddings and autocast. Default: "auto".
        implementation: How the loss is computed. "full": the whole matrix with plain autograd, the reference. "dense":
            the whole matrix with Triton kernels and few launches, for GPUs of compute capability 8.0 or newer.
            "chunked": tiles in PyTorch, on any device. "triton": tiles with Triton kernels, for GPUs of compute
            capability 9.0 or newer. If the kernels cannot run, "dense" and "triton" fall back to "chunked" with one
            warning that states the reason. "auto": on a CPU "chunked", which is faster than the whole matrix from
            about 1000 × 1000 scores; on a GPU "dense" if the matrix fits in the workspace, otherwise "triton" if
            available, otherwise "chunked". With a group, or under `torch.compile`, "auto" does not choose "dense".
            With a group, "full" and "dense" are not available. "dense" supports `excluded`, ids and `statistics` but
            none of `positives`, `negatives`, `matryoshka` and `teacher`, with which "auto" chooses "triton" or
            "chunked". `torch.compile` leaves a loss with `negatives.own`, `negatives.frozen`, `negatives.same_side`,
            `matryoshka` or `teacher` out of its graph. Default: "auto".
        exchange: How passages are exchanged between the ranks of a group. "ring": one block at a time, overlapped with
            the computation of the previous block. "gather": all at once, computed as one block. "auto": "gather" with
            two ranks or if the pool and its gradient fit in the workspace, otherwise "ring". Default: "auto".
        workspace_mib: Memory in MiB for tiles and temporaries, in addition to inputs and gradients. With
            implementation "triton" and bf16, memory beyond 256 MiB makes backward faster: forward keeps exponentials
            that backward would otherwise recompute. Default: 256.

    Returns:
        The loss or, with `statistics`, the loss and a `Statistics`. The loss is 0-dim, in float32 (float64 for float64
        embeddings). It is not finite if an embedding is not finite. It is differentiable once; only "full" has second
        derivatives.

    Raises:
        ValueError: If an argument is invalid, or two options do not combine. The message begins with the name of one.
            With a group, every rank raises. Values of CUDA tensors are not read, because this would synchronize with
            the device. For CUDA tensors, a non-finite `logit_scale`, an invalid pair or offset in an option and, for
            the kernels, an out-of-range `positive` make the loss NaN; "full" and "chunked" fail with PyTorch's own
            device-side assertion for an out-of-range `positive`.
    """
    given = given_options(positives, negatives, statistics, matryoshka, teacher)
    options: dict[str, Any] = {
        "logit_scale": logit_scale,
        "positive": positive,
        "positives": positives,
        "excluded": excluded,
        "negatives": negatives,
        "statistics": statistics,
        "matryoshka": matryoshka,
        "teacher": teacher,
        "symmetric": symmetric,
        "query_ids": query_ids,
        "passage_ids": passage_ids,
        "group": group,
        "precision": precision,
        "implementation": implementation,
        "exchange": exchange,
        "workspace_mib": workspace_mib,
    }
    if group is not None:
        further = None

        def checks() -> dict[str, Any]:
            nonlocal further
            further = checked_further(negatives, query)
            return {"negatives": None if further is None else further.summary()}

        sharded = distributed_batch(
            group,
            query,
            passage,
            logit_scale,
            positive,
            query_ids,
            passage_ids,
            excluded,
            symmetric=symmetric,
            precision=precision,
            implementation=implementation,
            exchange=exchange,
            workspace_mib=workspace_mib,
            positives=positives,
            negatives=negatives,
            statistics=statistics,
            checks=checks,
            matryoshka=matryoshka,
            teacher=teacher,
        )
        if is_combined(given):
            lists = partial(lists_over_ranks, sharded)
            found: Tensor | tuple[Tensor, Statistics] = combined_loss(
                inf_cl_loss, query, passage, options, further, lists
            )
            return found
        if further is not None:
            sharded = with_terms_over_ranks(sharded, further)
        if sharded.batch.options is None:
            return loss_over_ranks(sharded)
        return _with_statistics(*negatives_loss_over_ranks(sharded))
    check_choice("implementation", implementation, Implementation)
    check_choice("exchange", exchange, Exchange)
    workspace_bytes = checked_workspace(workspace_mib)
    batch = checked_batch(query, passage, logit_scale, positive, query_ids, passage_ids, symmetric, excluded)
    check_combination(positives, negatives, statistics, matryoshka, teacher, implementation)
    batch = with_options(batch, positives, negatives, statistics)
    further = checked_further(negatives, query)
    objective = checked_objective(batch, matryoshka, teacher)
    precision = resolve_precision(precision, query)
    if is_combined(given):
        lists = partial(lists_of_one_process, batch, objective, precision, implementation, workspace_bytes)
        found = combined_loss(inf_cl_loss, query, passage, options, further, lists)
        return found
    if further is not None:
        if batch.options is not None:
            batch = with_nan_for_invalid_pairs(with_nan_for_invalid_positives(batch, len(passage)), len(passage))
        return _with_statistics(*_loss_with_further(batch, further, precision, implementation, workspace_bytes))
    if batch.options is not None:
        return _with_statistics(*_loss_with_options(batch, precision, workspace_bytes, implementation))
    if implementation == "full":
        return full_matrix_objective(with_nan_for_invalid_pairs(batch, len(passage)), objective, precision)
    if not objective.plain:
        fused = uses_kernels(query, implementation)
        loss: Tensor = loss_of_one_process(batch, objective, precision, workspace_bytes, fused)
        return loss
    # Under torch.compile the tiled loss is used: it is one operator for the compiler.
    small = implementation == "auto" and fits_dense(batch, workspace_bytes) and not torch.compiler.is_compiling()
    if implementation == "dense" or (small and query.is_cuda):
        reason = why_not_dense(query)
        if reason is None:
            return dense_loss(batch, precision)
        if implementation == "dense":
            warn_fallback(implementation, reason)
    if implementation == "triton" or (implementation == "auto" and query.is_cuda):
        reason = why_not_fused(query)
        if reason is None:
            return fused_loss(batch, precision, workspace_bytes)
        if implementation == "triton":
            warn_fallback(implementation, reason)
    batch = with_nan_for_invalid_pairs(batch, len(passage))
    if torch.compiler.is_compiling():
        return compiled_tiled_loss(batch, precision, workspace_bytes)
    return tiled_loss(batch, precision, workspace_bytes)


def _loss_with_options(
    batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, implementation: Implementation
) -> tuple[Tensor, Statistics | None]:
    passages = len(batch.passage)
    if implementation == "full":
        batch = with_nan_for_invalid_pairs(with_nan_for_invalid_positives(batch, passages), passages)
        loss, statistics = full_matrix_negatives_loss(batch, precision)
        return loss, statistics if batch.options is not None and batch.options.statistics else None
    compiling = torch.compiler.is_compiling()
    small = implementation == "auto" and batch.query.is_cuda and fits_dense(batch, workspace_bytes) and not compiling
    if implementation == "dense" or small:
        reason = why_not_dense(batch.query)
        only_statistics = batch.options is not None and not needs_negatives(batch.options)
        if only_statistics and reason is None:
            # Its kernels make the loss NaN for an invalid pair or positive, with fewer launches than below.
            return dense_loss_and_statistics(batch, precision)
        if implementation == "dense" and reason is not None:
            warn_fallback(implementation, reason)
    batch = with_nan_for_invalid_pairs(with_nan_for_invalid_positives(batch, passages), passages)
    fused = implementation == "triton" or (implementation == "auto" and batch.query.is_cuda)
    reason = why_not_fused(batch.query) if fused else None
    if reason is not None and implementation == "triton":
        warn_fallback(implementation, reason)
    loss_of = compiled_negatives_loss if compiling else negatives_loss
    return loss_of(batch, precision, workspace_bytes, fused and reason is None)


def _with_statistics(loss: Tensor, statistics: Statistics | None) -> Tensor | tuple[Tensor, Statistics]:
    return loss if statistics is None else (loss, statistics)


# The sources are autograd functions of their own, which the compiler must not trace.
@torch.compiler.disable
def _loss_with_further(
    batch: ContrastiveBatch,
    further: FurtherNegatives,
    precision: Precision,
    implementation: Implementation,
    workspace_bytes: int,
) -> tuple[Tensor, Statistics | None]:
    """The loss of one process with negatives outside the pool, and statistics if they are wanted."""
    if implementation == "full":
        batch = with_nan_for_invalid_pairs(batch, len(batch.passage))
        batch, further = with_nan_for_invalid_negatives(batch, further)
        if batch.options is None:
            return full_matrix_loss(batch, precision, further), None
        loss, statistics = full_matrix_negatives_loss(batch, precision, further)
        return loss, statistics if batch.options.statistics else None
    reason: str | None = "not requested"
    if implementation == "triton" or (implementation == "auto" and batch.query.is_cuda):
        reason = why_not_fused(batch.query)
        if reason is not None and implementation == "triton":
            warn_fallback(implementation, reason)
    fused = reason is None
    if not fused:
        batch = with_nan_for_invalid_pairs(batch, len(batch.passage))
    batch = with_further_terms(batch, further, precision, workspace_bytes, fused)
    if batch.options is not None:
        return negatives_loss(batch, precision, workspace_bytes, fused)
    return (fused_loss if fused else tiled_loss)(batch, precision, workspace_bytes), None
