"""One optimizer step: towers, loss, gradient cache and optimizer for a prepared batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from losses import Guide, InfCLLoss, SigmoidLoss
from retriever.config.run import TrainConfig
from retriever.data.micro_batches import PreparedBatch, TowerInputs
from retriever.distributed.gradients import average_gradients
from retriever.distributed.ranks import Ranks
from retriever.models.fsdp import is_sharded
from retriever.models.memory import GraphMemory
from retriever.models.mixed_precision import mixed_precision
from retriever.models.sharded_tensors import clip_gradients
from retriever.models.towers import Towers
from retriever.training import grad_cache
from retriever.training.objective.checks import has_statistics
from retriever.training.objective.guide import Guides
from retriever.training.objective.hardest import hardest_scores
from retriever.training.objective.options import LossOptions
from retriever.training.objective.sources import SourceLosses, SourceObjective, loss_of_source
from retriever.training.objective.statistics import PartStatistics, masked_without_guide
from retriever.training.objective.stored import StoredEmbeddings
from retriever.training.optimization.average import WeightAverage
from retriever.training.optimization.optim import lr_factor, set_learning_rates
from retriever.training.profiler import phase
from retriever.utils.device import Precision, autocast, loss_device


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a group that pass through a tower together."""

    group: TowerInputs
    rows: np.ndarray
    """int64 [n]. Empty if this rank only takes part in a micro-batch of other ranks, because the towers are sharded."""

    def embed(self, towers: Towers) -> Tensor:
        """Return embeddings [n, D]."""
        if len(self.rows):
            return self.group.embed(towers, self.rows)
        return self.group.embed(towers, np.argmin(self.group.lengths, keepdims=True))[:0]


class StepResult(NamedTuple):
    """What a step returns, on the device."""

    loss: Tensor
    """0-dim."""
    grad_norm: Tensor
    """0-dim, the norm of the gradients before clipping."""
    statistics: Sequence[PartStatistics] = ()
    """Statistics of each part of the batch; none if they were not wanted, or the configuration has none."""


@dataclass(frozen=True)
class TrainStep:
    """Callable that makes an optimizer step, without synchronizing with the device."""

    config: TrainConfig
    precision: Precision
    """Precision of the towers."""
    towers: Towers
    loss: InfCLLoss | SigmoidLoss | SourceLosses
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    graphs: GraphMemory
    steps: int
    """Number of steps of the run, for the learning rate."""
    ranks: Ranks = field(default_factory=Ranks)
    """The ranks, each of which has a share of the batch."""
    average: WeightAverage | None = None
    """Moving average of the weights, which each step updates."""
    stored: StoredEmbeddings | None = None
    """Frozen passages, or a teacher's embeddings; None without them."""
    guide: Guides | None = None
    """The model that says which negatives are probably false."""

    @cached_property
    def objectives(self) -> list[SourceObjective]:
        """How the loss is computed for each source."""
        return SourceObjective.of_all(self.config)

    def __call__(
        self,
        batch: PreparedBatch,
        step: int,
        *,
        statistics: bool = False,
        observe: Callable[[Tensor], None] | None = None,
        rejects: Callable[[Tensor], bool] | None = None,
    ) -> StepResult:
        """Make a step.

        Args:
            batch: the batch, or the share of this rank.
            step: number of the step, from 0.
            statistics: whether to compute statistics too, if the configuration has them. Default: False.
            observe: called with the embeddings of the queries, [n, D]. Default: None.
            rejects: function of the loss that returns whether the optimizer skips this step. Default: None, never.
        """
        config, device = self.config, self.towers.device
        of_loss = loss_device(device)
        torch.manual_seed(_step_seed(config.seed, step, self.ranks.rank))
        set_learning_rates(self.optimizer, lr_factor(step, self.steps, config.optim))
        micro_batches, keep = self._micro_batches(batch)
        found: list[PartStatistics] = []
        statistics = statistics and all(
            has_statistics(replace(config, loss=self.objectives[part.source].loss)) for part in batch.parts or (batch,)
        )

        with phase("guide"):
            guides: list[Guide | None] = [None] * max(1, len(batch.parts))
            if self.guide is not None:
                guides = self.guide.options(batch, self.objectives, of_loss)

        def loss_of(embeddings: Sequence[Tensor]) -> Tensor:
            losses: list[Tensor] = []
            merged = batch.merge_embeddings(embeddings, of_loss)
            if observe is not None:
                observe(merged[0])
            for number, (part, query, passage) in enumerate(batch.split(*merged)):
                objective = self.objectives[part.source]
                passage, options = LossOptions.of(
                    part, passage, objective.loss, guide=guides[number], statistics=statistics
                )
                further = None
                if self.stored is not None:
                    passage, options, further = self.stored.apply(part, options, query, passage, self.ranks)
                # Autocast makes the loss use the precision of the towers if its own is "auto".
                with autocast(of_loss, self.precision):
                    loss_of_part = loss_of_source(self.loss, part.source)
                    loss = loss_of_part(query, passage, **options.arguments())
                    if statistics:
                        loss, numbers = loss
                        without_guide = masked_without_guide(loss_of_part, query, passage, options)
                        shown = part.texts is not None and self.ranks.is_first
                        sizes = objective.loss.matryoshka.dims[-1:]
                        hardest = hardest_scores(numbers, query, passage, guides[number], *sizes) if shown else None
                        found.append(PartStatistics(part, numbers, without_guide, hardest))
                if further is not None:
                    loss = loss + further
                losses.append(loss * part.loss_share if batch.parts else loss)
            return self.scaler.scale(torch.stack(losses).sum() if batch.parts else losses[0])

        with mixed_precision(self.towers, self.precision):
            scaled = grad_cache.backward(
                lambda micro: micro.embed(self.towers),
                micro_batches,
                loss_of,
                device,
                keep=keep,
                on_host=config.offload_embeddings or of_loss != device,
            )
        loss = scaled / self.scaler.get_scale() if self.scaler.is_enabled() else scaled
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        with phase("average over ranks"):
            average_gradients(parameters, self.ranks)
        with phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            grad_norm = clip_gradients(parameters, config.optim.max_grad_norm)
            if rejects is None or not rejects(loss):
                self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update(step + 1)
        return StepResult(loss, grad_norm, found)

    def _micro_batches(self, batch: PreparedBatch) -> tuple[list[MicroBatch], int]:
        """Return the micro-batches, and how many of the last ones keep their graph.

        For sharded towers, all ranks have the same number of micro-batches per group.
        """
        sizes, rows_of_groups = batch.micro_batch_tokens, [group.micro_batches for group in batch.groups]
        keep = self.graphs.kept(sizes)
        if is_sharded(self.towers):
            counts = [int(self.ranks.all_reduce_max(len(rows))) for rows in rows_of_groups]
            rows_of_groups = [
                rows + [np.empty(0, dtype=np.int64)] * (count - len(rows))
                for rows, count in zip(rows_of_groups, counts, strict=True)
            ]
            # The minimum over ranks.
            keep = -int(self.ranks.all_reduce_max(-(sum(counts) if keep == len(sizes) else keep)))
        micro_batches = [
            MicroBatch(group, rows)
            for group, group_rows in zip(batch.groups, rows_of_groups, strict=True)
            for rows in group_rows
        ]
        return micro_batches, keep


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed that is independent for each seed, step and rank."""
    words = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
