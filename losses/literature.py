"""Contrastive losses from the literature, written as in their papers: baselines for `inf_cl_loss`.

`clip_loss` is for one process. The other functions compute the same loss over the ranks of a process group. Each takes
this rank's pairs (any number) and returns the mean over the pairs of all ranks, the same on every rank. Gradients are
W times this rank's contribution: averaging them over ranks, as DDP does, gives the gradient of the whole batch,
including that of logit_scale.

Memory for scores on each of W ranks, for M pairs in total:

    gathered_clip_loss     the whole matrix on every rank                        O(M²)
    local_rows_loss        this rank's rows, in both directions                  O(M² / W)
    disco_clip_loss        as local_rows_loss, gradients reduced as in DisCo-CLIP  O(M² / W)
    ring_clip_loss         one block of the matrix at a time                     O(M² / W²)

The first three store the embeddings of all pairs, O(M · D), on every rank. The ring stores a few shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from losses.distributed.communication import Communication, communication_of
from losses.inf_cl import inf_cl_loss
from losses.inputs import checked_batch

# Larger than any block, so that a tile is a whole block.
_UNLIMITED_MIB = 2.0**30


def clip_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor) -> Tensor:
    """Symmetric loss of CLIP over the full matrix (Radford et al., arXiv 2103.00020, figure 3).

    Products and softmaxes follow the dtype of the inputs and autocast, as in the original. Memory is several times N².

    Args:
        query: [N, D] embeddings; row i of `query` and row i of `passage` are a pair.
        passage: [N, D] embeddings, of the same dtype and on the same device.
        logit_scale: 1 / temperature, as a number or a 0-dim floating-point tensor.

    Returns:
        0-dim loss, in the dtype that the inputs and autocast give.

    Raises:
        ValueError: If an argument is invalid, as in `inf_cl_loss`, or if the two sides have different lengths. The
            message begins with the argument's name.
    """
    if isinstance(query, Tensor) and isinstance(passage, Tensor) and query.shape[:1] != passage.shape[:1]:
        raise ValueError(f"passage has {len(passage)} rows, query has {len(query)}: clip_loss pairs them")
    batch = checked_batch(query, passage, logit_scale, None, None, None, symmetric=True)
    logits = batch.logit_scale * (query @ passage.T)
    labels = torch.arange(query.shape[0], device=query.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def gathered_clip_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor, group: Any) -> Tensor:
    """CLIP loss over ranks: every rank gathers all pairs and computes the whole matrix.

    This is the distributed loss of CLIP (Radford et al., arXiv 2103.00020) and of OpenCLIP with `gather_with_grad`.

    Args:
        query: [M_r, D] embeddings of this rank; row i of `query` and row i of `passage` are a pair.
        passage: [M_r, D] embeddings of this rank, of the same dtype and on the same device.
        logit_scale: 1 / temperature, as a number or a 0-dim floating-point tensor.
        group: A `torch.distributed` process group.

    Returns:
        0-dim loss, the mean over the pairs of all ranks.

    Raises:
        ValueError: If an argument is invalid, as in `clip_loss`. The message begins with the argument's name.
    """
    pairs = _LocalPairs(query, passage, logit_scale, group)
    every_query, every_passage = pairs.gathered("reduce_scatter")
    logits = pairs.scale * (every_query @ every_passage.T)
    labels = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def local_rows_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor, group: Any) -> Tensor:
    """CLIP loss over ranks: this rank's queries against all passages, and its passages against all queries.

    This is OpenCLIP (Ilharco et al.) with `local_loss` and `gather_with_grad`: gradients of the gathered embeddings
    are reduced with reduce_scatter.

    Args:
        query: [M_r, D] embeddings of this rank; row i of `query` and row i of `passage` are a pair.
        passage: [M_r, D] embeddings of this rank, of the same dtype and on the same device.
        logit_scale: 1 / temperature, as a number or a 0-dim floating-point tensor.
        group: A `torch.distributed` process group.

    Returns:
        0-dim loss, the mean over the pairs of all ranks.

    Raises:
        ValueError: If an argument is invalid, as in `clip_loss`. The message begins with the argument's name.
    """
    return _local_rows(_LocalPairs(query, passage, logit_scale, group), "reduce_scatter")


def disco_clip_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor, group: Any) -> Tensor:
    """CLIP loss over ranks with the gradient decomposition of DisCo-CLIP (Chen et al., arXiv 2304.08480).

    Each rank computes the loss of its rows and their contribution to the gradients of all pairs. The contributions are
    summed with all_reduce, and each rank keeps the gradients of its own pairs.

    Args:
        query: [M_r, D] embeddings of this rank; row i of `query` and row i of `passage` are a pair.
        passage: [M_r, D] embeddings of this rank, of the same dtype and on the same device.
        logit_scale: 1 / temperature, as a number or a 0-dim floating-point tensor.
        group: A `torch.distributed` process group.

    Returns:
        0-dim loss, the mean over the pairs of all ranks.

    Raises:
        ValueError: If an argument is invalid, as in `clip_loss`. The message begins with the argument's name.
    """
    return _local_rows(_LocalPairs(query, passage, logit_scale, group), "all_reduce")


def ring_clip_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor, group: Any) -> Tensor:
    """CLIP loss over ranks by a ring, one whole block of scores at a time.

    Passages move from rank to rank. This is Inf-CL (Cheng et al., arXiv 2410.17243) without its tiles. On a CPU a block
    is still computed in tiles that fit in the cache.

    Args:
        query: [M_r, D] embeddings of this rank; row i of `query` and row i of `passage` are a pair.
        passage: [M_r, D] embeddings of this rank, of the same dtype and on the same device.
        logit_scale: 1 / temperature, as a number or a 0-dim floating-point tensor.
        group: A `torch.distributed` process group.

    Returns:
        0-dim loss, the mean over the pairs of all ranks.

    Raises:
        ValueError: If an argument is invalid, as in `inf_cl_loss`. The message begins with the argument's name.
    """
    return inf_cl_loss(
        query,
        passage,
        logit_scale=logit_scale,
        symmetric=True,
        group=group,
        implementation="chunked",
        exchange="ring",
        workspace_mib=_UNLIMITED_MIB,
    )


class _LocalPairs:
    """The checked pairs of this rank and the number of pairs on each rank."""

    def __init__(self, query: Tensor, passage: Tensor, logit_scale: float | Tensor, group: Any) -> None:
        batch = checked_batch(query, passage, logit_scale, None, None, None, symmetric=True, shard=True)
        self.query, self.passage, self.scale = batch.query, batch.passage, batch.logit_scale
        self.communication = communication_of(group)
        rows = self.communication.gather_host(torch.tensor([len(query), len(passage)]))
        if not bool((rows[:, 0] == rows[:, 1]).all()):
            raise ValueError(
                f"passage must have as many rows as query, found [queries, passages] by rank {rows.tolist()}"
            )
        self.counts: list[int] = rows[:, 0].tolist()

    def gathered(self, backward_collective: str) -> tuple[Tensor, Tensor]:
        """Queries and passages [M, D] of all ranks; `backward_collective` reduces their gradients."""
        query, passage = (
            _GatherRows.apply(side, self.counts, self.communication, backward_collective)
            for side in (self.query, self.passage)
        )
        return query, passage


def _local_rows(pairs: _LocalPairs, backward_collective: str) -> Tensor:
    """Loss of this rank's rows in both directions; its value is the mean over all ranks."""
    communication, counts = pairs.communication, pairs.counts
    own, first = counts[communication.rank], sum(counts[: communication.rank])
    queries, passages = pairs.gathered(backward_collective)
    labels = torch.arange(first, first + own, device=queries.device)
    directions = ((pairs.query, passages), (pairs.passage, queries))
    losses = [cross_entropy(pairs.scale * (side @ all_.T), labels, reduction="sum") for side, all_ in directions]
    rank_loss = (losses[0] + losses[1]) * communication.size / (2 * sum(counts))
    mean = rank_loss.detach().clone()
    communication.reduce_sum(mean)
    # The value is that of all ranks, the gradient that of this rank.
    return rank_loss + (mean / communication.size - rank_loss).detach()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: Sequence[int], communication: Communication, backward_collective: str
    ) -> Tensor:
        ctx.counts, ctx.communication, ctx.backward_collective = counts, communication, backward_collective
        return communication.gather_rows(rows, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        counts, communication = ctx.counts, ctx.communication
        if ctx.backward_collective == "reduce_scatter":
            return communication.scatter_sums(gradient.contiguous(), counts), None, None, None
        whole = gradient.clone()
        communication.reduce_sum(whole)
        return whole.split(counts)[communication.rank], None, None, None
