"""Losses of the literature by their names, as their papers write them: baselines to compare `inf_cl_loss` with.

`clip_loss` is for one process. The others are the same loss over ranks: each takes this rank's pairs (any number) and
returns the mean over all ranks' pairs, the same on every rank. Gradients are W times this rank's share: averaged over
ranks, as DDP does, they are those of the whole batch, logit_scale's too. For M pairs in all, D wide, over W ranks,
memory of scores on each rank:

    gathered_clip_loss     the whole matrix on every rank                      O(M²)
    local_rows_loss        this rank's rows of both directions                 O(M² / W)
    disco_clip_loss        the same, gradients exchanged as DisCo-CLIP does    O(M² / W)
    ring_clip_loss         one block of the matrix at a time                   O(M² / W²)

The first three hold both sides of all pairs, O(M·D), on every rank; the ring holds a few shards.
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

# More than any block needs: a tile is then the whole block.
_NO_TILES_MIB = 2.0**30


def clip_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor) -> Tensor:
    """CLIP's symmetric loss over the full matrix (Radford et al., arXiv 2103.00020, figure 3).

    query and passage: [N, D] of one dtype and device, row i of each a pair. logit_scale: 1 / temperature, a number or
    a 0-dim tensor. Products and softmaxes follow the inputs' dtype and autocast, as in the original; memory is
    several times N². Returns a 0-dim loss. Raises ValueError, naming the argument, as `inf_cl_loss` does, and when
    the two have different lengths.
    """
    if isinstance(query, Tensor) and isinstance(passage, Tensor) and query.shape[:1] != passage.shape[:1]:
        raise ValueError(f"passage has {len(passage)} rows, query has {len(query)}: clip_loss pairs them")
    batch = checked_batch(query, passage, logit_scale, None, None, None, symmetric=True)
    logits = batch.logit_scale * (query @ passage.T)
    labels = torch.arange(query.shape[0], device=query.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def gathered_clip_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor, group: Any) -> Tensor:
    """Every rank gathers all pairs and computes the whole matrix (CLIP, arXiv 2103.00020; OpenCLIP's gather_with_grad).

    query and passage: [M_r, D], row i of each a pair. Raises ValueError, naming the argument, as `clip_loss` does.
    """
    pairs = _Pairs(query, passage, logit_scale, group)
    every_query, every_passage = pairs.gathered("scatter")
    logits = pairs.scale * (every_query @ every_passage.T)
    labels = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def local_rows_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor, group: Any) -> Tensor:
    """This rank's queries against all passages, and its passages against all queries (OpenCLIP's local_loss, Ilharco et
    al., with gather_with_grad: gradients of the gathered sides are summed and scattered).

    query and passage: [M_r, D], row i of each a pair. Raises ValueError, naming the argument, as `clip_loss` does.
    """
    return _local_rows(_Pairs(query, passage, logit_scale, group), "scatter")


def disco_clip_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor, group: Any) -> Tensor:
    """Local rows with gradients decomposed as in DisCo-CLIP (Chen et al., arXiv 2304.08480): each rank computes what
    its rows give to all pairs' gradients, these are summed over ranks by all-reduce, and each keeps its own.

    query and passage: [M_r, D], row i of each a pair. Raises ValueError, naming the argument, as `clip_loss` does.
    """
    return _local_rows(_Pairs(query, passage, logit_scale, group), "reduce")


def ring_clip_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor, group: Any) -> Tensor:
    """Passages travel a ring and meet the queries a whole block at a time: Inf-CL (arXiv 2410.17243) without its tiles.

    On a CPU a block is still computed by tiles, which stay in its cache. query and passage: [M_r, D], row i of each a
    pair. Raises ValueError, naming the argument, as `inf_cl_loss` does.
    """
    return inf_cl_loss(
        query,
        passage,
        logit_scale=logit_scale,
        symmetric=True,
        group=group,
        implementation="chunked",
        exchange="ring",
        workspace_mib=_NO_TILES_MIB,
    )


class _Pairs:
    """This rank's pairs, checked, and how many each rank has."""

    def __init__(self, query: Tensor, passage: Tensor, logit_scale: float | Tensor, group: Any) -> None:
        batch = checked_batch(query, passage, logit_scale, None, None, None, symmetric=True, shard=True)
        self.query, self.passage, self.scale = batch.query, batch.passage, batch.logit_scale
        self.communication = communication_of(group)
        rows = self.communication.gather_host(torch.tensor([len(query), len(passage)]))
        if not bool((rows[:, 0] == rows[:, 1]).all()):
            raise ValueError(f"passage has other rows than query: pairs of ranks [queries, passages] {rows.tolist()}")
        self.counts: list[int] = rows[:, 0].tolist()

    def gathered(self, home: str) -> tuple[Tensor, Tensor]:
        """All ranks' queries and passages [M, D], with gradients of these that come `home` one way or the other."""
        query, passage = (
            _Gather.apply(side, self.counts, self.communication, home) for side in (self.query, self.passage)
        )
        return query, passage


def _local_rows(pairs: _Pairs, home: str) -> Tensor:
    communication, counts = pairs.communication, pairs.counts
    own, first = counts[communication.rank], sum(counts[: communication.rank])
    queries, passages = pairs.gathered(home)
    labels = torch.arange(first, first + own, device=queries.device)
    directions = ((pairs.query, passages), (pairs.passage, queries))
    losses = [cross_entropy(pairs.scale * (side @ all_.T), labels, reduction="sum") for side, all_ in directions]
    share = (losses[0] + losses[1]) * communication.size / (2 * sum(counts))
    mean = share.detach().clone()
    communication.reduce_sum(mean)
    # The value of all ranks with the gradient of this one.
    return share + (mean / communication.size - share).detach()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], communication: Communication, home: str) -> Tensor:
        ctx.counts, ctx.communication, ctx.home = counts, communication, home
        return communication.gather_rows(rows, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        counts, communication = ctx.counts, ctx.communication
        if ctx.home == "scatter":
            return communication.scatter_sums(gradient.contiguous(), counts), None, None, None
        whole = gradient.clone()
        communication.reduce_sum(whole)
        return whole.split(counts)[communication.rank], None, None, None
