"""Batches with negatives outside the pool, and their loss and gradients, for the tests of `negatives`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from losses import NegativeLimit, Negatives, Ragged, inf_cl_loss

SOURCES = ("own", "frozen", "same_side")


@dataclass(frozen=True)
class Batch:
    """float64 embeddings and everything that `inf_cl_loss` takes beside them."""

    query: Tensor
    passage: Tensor
    own: Tensor
    offsets: Tensor
    frozen: Tensor
    frozen_excluded: Tensor
    positive: Tensor | None
    passage_ids: Tensor | None
    excluded: Tensor | None

    @classmethod
    def random(
        cls, queries: int, passages: int, dims: int = 12, frozen: int = 41, *, masks: bool, random_positive: bool,
        own: int = 4, seed: int = 0,
    ) -> Batch:  # fmt: skip
        """Unit vectors; passage i is similar to query i. Queries have 0 to `own` own negatives."""
        generator = torch.Generator().manual_seed(seed)

        def unit(rows: int) -> Tensor:
            return normalize(torch.randn(rows, dims, dtype=torch.float64, generator=generator), dim=1)

        def integers(high: int, count: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        query, passage = unit(queries), unit(passages)
        passage[:queries] = normalize(passage[:queries] + 0.3 * query, dim=1)
        offsets = torch.cat([torch.zeros(1).long(), integers(own + 1, queries).cumsum(0)])
        positive = integers(passages, queries) if random_positive else None
        rows, columns = integers(queries, 2 * queries), integers(passages, 2 * queries)
        mine = torch.arange(queries) if positive is None else positive
        excluded = torch.stack([rows, columns], 1)[columns != mine[rows]]
        pairs = torch.stack([integers(queries, queries), integers(frozen, queries)], 1)
        ids = torch.arange(passages) % max(2, passages // 2)
        return cls(
            query, passage, unit(int(offsets[-1])), offsets, unit(frozen), pairs, positive, ids if masks else None,
            excluded if masks and len(excluded) else None,
        )  # fmt: skip

    def rounded(self, dtype: torch.dtype) -> Batch:
        """The same batch with embeddings that `dtype` represents exactly."""
        names = ("query", "passage", "own", "frozen")
        return replace(self, **{name: getattr(self, name).to(dtype).double() for name in names})


def step(
    batch: Batch,
    sources: tuple[str, ...],
    logit_scale: float,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    upstream: float = 0.7,
    limit: NegativeLimit | None = None,
    **options: Any,
) -> list[Tensor]:
    """The loss, and gradients of query, passage, logit_scale and, with "own", of the own negatives, in float64."""
    leaves = [side.detach().to(device, dtype).requires_grad_() for side in (batch.query, batch.passage)]
    wide = torch.promote_types(dtype, torch.float32)
    leaves.append(torch.tensor(logit_scale, dtype=wide, device=device, requires_grad=True))
    own = None
    if "own" in sources:
        leaves.append(batch.own.detach().to(device, dtype).requires_grad_())
        own = Ragged(leaves[3], batch.offsets.to(device))
    has_frozen = "frozen" in sources
    negatives = Negatives(
        own=own,
        frozen=options.pop("frozen", batch.frozen.to(device, dtype)) if has_frozen else None,
        frozen_excluded=batch.frozen_excluded.to(device) if has_frozen and batch.excluded is not None else None,
        same_side="same_side" in sources,
        limit=limit,
    )

    def here(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    loss = inf_cl_loss(
        leaves[0], leaves[1], logit_scale=leaves[2], negatives=negatives, positive=here(batch.positive),
        passage_ids=here(batch.passage_ids), excluded=here(batch.excluded), **options,
    )  # fmt: skip
    return [each.double().cpu() for each in (loss.detach(), *torch.autograd.grad(upstream * loss, leaves))]


def relative_errors(found: list[Tensor], truth: list[Tensor], floor: float = 1e-6) -> list[float]:
    """Relative errors in the Euclidean norm; norms below `floor` count as `floor`."""
    return [float((a - b).norm() / b.norm().clamp(min=floor)) for a, b in zip(found, truth, strict=True)]
