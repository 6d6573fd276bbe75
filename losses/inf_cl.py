"""InfoNCE over in-batch and hard negatives: the public function and the choice of implementation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from losses.distributed.api import Exchange, distributed_batch, loss_over_ranks
from losses.inputs import check_choice, checked_batch, checked_workspace, with_checked_pairs
from losses.precision import Precision, resolve_precision
from losses.reference import full_matrix_loss
from losses.torch_tiles.compiled import compiled_tiled_loss
from losses.torch_tiles.inf_cl import tiled_loss
from losses.triton.dense import dense_loss, fits_dense
from losses.triton.inf_cl import fused_loss
from losses.triton.launch import warn_of_step_down, why_not_dense, why_not_fused

Implementation = Literal["auto", "full", "dense", "chunked", "triton"]


def inf_cl_loss(
    query: Tensor,
    passage: Tensor,
    *,
    logit_scale: float | Tensor,
    positive: Tensor | None = None,
    excluded: Tensor | None = None,
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    passage_ids: Tensor | None = None,
    group: Any = None,
    precision: Precision = "auto",
    implementation: Implementation = "auto",
    exchange: Exchange = "auto",
    workspace_mib: float = 256,
) -> Tensor:
    """InfoNCE (van den Oord et al., arXiv 1807.03748) in memory linear in the batch (Inf-CL, arXiv 2410.17243).

    With S = logit_scale · Q Kᵀ [M, N] and p(i) the positive of query i, the row loss of a query is
    log Σ_j exp(S_ij) − S_i,p(i), and the loss is its mean over queries. With `symmetric` the column loss
    log Σ_i' exp(S_i',p(i)) − S_i,p(i) is averaged over queries too, and the loss is half the sum of both means.

    Args:
        query: [M, D] embeddings; float32, bfloat16, float16 (or float64, computed in float64).
        passage: [N, D] embeddings of the same dtype on the same device. Rows that are nobody's positive are hard
            negatives of every query in the row loss.
        logit_scale: 1 / temperature; a number or a 0-dim floating-point tensor, which then gets its gradient.
        positive: [M] integers, the row of each query's positive in `passage`; by default 0 … M−1. Queries may share
            a positive.
        excluded: [R, 2] integers (query row, passage row), in any order, also several times: entries that leave S, for
            both directions. These passages are no negatives of these queries, known positives that were not drawn for
            this batch, say. A query's own positive is refused. Costs 8 bytes and a look at one tile for each pair.
        symmetric: add the column loss.
        query_ids, passage_ids: [M] and [N] integers. Entry (i, j) leaves S, for both directions, when
            passage_ids[j] == query_ids[i] and j != positive[i]: such a passage is no negative of that query.
            query_ids defaults to passage_ids[positive]. An entry (i', positive[i']) is never masked, so queries that
            share one row as positive compete with each other in its column; give each its own row, with equal ids, to
            keep them apart.
        group: None for the loss of this process's batch, or a torch.distributed process group whose ranks each hold a
            shard of one batch: M_r queries and N_r passages, different on each rank or none (then [0, D], and
            requires_grad as elsewhere). The pool has the shards in the order of ranks; `positive` [M_r] are rows of the
            pool, by default the own shard's rows in order; all passages are negatives of all queries, and ids are
            compared across ranks (query_ids by default those of the positives, wherever they lie). `excluded` has rows
            of this rank's queries and rows of the pool. The value, the mean over all ranks' queries, is the same on
            every rank. Gradients, logit_scale's too, are W times this rank's share: averaged over ranks, as DDP does,
            they are those of the whole batch. Every rank calls forward and backward. Memory is O((M + N)·D / W);
            distributed/ring.py counts what is sent. Arguments are compared on the host: give a group on GPUs a gloo
            backend too ("cpu:gloo,cuda:nccl"), or the host waits for the device there.
        precision: of the products' operands; sums are float32 always. "fp32" (by three tf32 products of split operands
            in triton's scores); "tf32" allows CUDA's tf32 products
            here, whatever the global setting; "bf16" rounds operands to bfloat16; "auto" follows the embeddings'
            dtype and autocast.
        implementation: "full" (whole matrix, plain autograd: the oracle); "dense" (whole matrix, few launches: Triton
            kernels for GPUs of compute capability 8.0 on); "chunked" (tiles in PyTorch); "triton" (tiles by kernels for
            GPUs of 9.0 on). Where kernels cannot run, "chunked" stands in, with one warning that says why. "auto" takes
            chunked on a CPU, where tiles beat the whole matrix from about 1000 × 1000 scores on; on a GPU dense while
            the matrix fits the workspace, then triton where it runs, otherwise chunked. With a group, or under
            torch.compile, "auto" does not take dense.
        exchange: with a group, how passages travel: "ring" (a block at a time, beside the tiles of the one before),
            "gather" (all at once, one block of tiles), or "auto": gather among two ranks, and where the pool and its
            gradient's sum fit the workspace, otherwise ring.
        workspace_mib: MiB that tiles and their temporaries may take beside inputs and gradients. "triton" in bf16 turns
            what it is given beyond 256 into speed: it keeps exponentials that backward would compute again.

    Returns:
        0-dim loss, float32 (float64 for float64 embeddings); differentiable once, except with "full". Not finite when
        an embedding is not.

    Raises:
        ValueError: an argument does not fit; the message begins with its name. To look at values of CUDA tensors would
            wait for the device: there a logit_scale that is not finite, an excluded pair that does not fit, and for
            the kernels a positive that is no passage, makes the loss NaN ("full" and "chunked" end in torch's own
            assertion). With a group every rank raises, whichever has the bad argument.
    """
    if group is not None:
        ranked = distributed_batch(
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
        )
        return loss_over_ranks(ranked)
    check_choice("implementation", implementation, Implementation)
    check_choice("exchange", exchange, Exchange)
    workspace_bytes = checked_workspace(workspace_mib)
    batch = checked_batch(query, passage, logit_scale, positive, query_ids, passage_ids, symmetric, excluded)
    precision = resolve_precision(precision, query)
    if implementation == "full":
        return full_matrix_loss(with_checked_pairs(batch, len(passage)), precision)
    # torch.compile is given the operators of the tiles, which it takes whole.
    small = implementation == "auto" and fits_dense(batch, workspace_bytes) and not torch.compiler.is_compiling()
    if implementation == "dense" or (small and query.is_cuda):
        reason = why_not_dense(query)
        if reason is None:
            return dense_loss(batch, precision)
        if implementation == "dense":
            warn_of_step_down(implementation, reason)
    if implementation == "triton" or (implementation == "auto" and query.is_cuda):
        reason = why_not_fused(query)
        if reason is None:
            return fused_loss(batch, precision, workspace_bytes)
        if implementation == "triton":
            warn_of_step_down(implementation, reason)
    batch = with_checked_pairs(batch, len(passage))
    if torch.compiler.is_compiling():
        return compiled_tiled_loss(batch, precision, workspace_bytes)
    return tiled_loss(batch, precision, workspace_bytes)
