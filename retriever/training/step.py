"""One optimizer step: a prepared batch through towers, loss and gradient cache into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from losses import InfCLLoss, SigmoidLoss
from retriever.config.run import TrainConfig
from retriever.data.micro_batches import Group, PreparedBatch
from retriever.distributed.gradients import average_gradients
from retriever.distributed.ranks import Ranks
from retriever.models.fsdp import is_sharded
from retriever.models.memory import GraphMemory
from retriever.models.mixed_precision import arithmetic
from retriever.models.sharded_tensors import clip_gradients
from retriever.models.towers import Towers
from retriever.training import grad_cache
from retriever.training.optim import lr_factor
from retriever.training.profiler import phase
from retriever.utils.device import Precision, autocast, to_device


@dataclass(frozen=True)
class MicroBatch:
    """What passes through a tower at once: rows of one group."""

    group: Group
    rows: np.ndarray
    """None of them where a rank takes part in another's micro-batch: divided towers are gathered by all."""

    def embed(self, towers: Towers) -> Tensor:
        """Embeddings [rows, dimension]."""
        if len(self.rows):
            return self.group.embed(towers, self.rows)
        return self.group.embed(towers, np.argmin(self.group.lengths, keepdims=True))[:0]


@dataclass(frozen=True)
class TrainStep:
    """What a step works on; called with a batch, it makes one. Nothing in it waits for the device."""

    config: TrainConfig
    precision: Precision
    """Of the towers."""
    towers: Towers
    loss: InfCLLoss | SigmoidLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    graphs: GraphMemory
    steps: int
    """Of the whole run, for the learning rate."""
    ranks: Ranks = field(default_factory=Ranks)
    """Who takes part; each has its share of the batch."""

    def __call__(self, batch: PreparedBatch, step: int) -> tuple[Tensor, Tensor]:
        """Step number `step`, from 0; returns the loss and the gradients' norm before clipping, as device scalars."""
        config, device = self.config, self.towers.device
        torch.manual_seed(_step_seed(config.seed, step, self.ranks.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.lr * lr_factor(step, self.steps, config.optim)
        micro_batches, keep = self._micro_batches(batch)

        def loss_of(embeddings: Sequence[Tensor]) -> Tensor:
            query, passage = batch.arrange(embeddings, device)
            # Inside, so that the loss's precision "auto" is the towers'.
            with autocast(device, self.precision):
                loss = self.loss(query, passage, **self._masks(batch, device))
            return self.scaler.scale(loss)

        with arithmetic(self.towers, self.precision):
            scaled = grad_cache.backward(
                lambda micro: micro.embed(self.towers),
                micro_batches,
                loss_of,
                device,
                keep=keep,
                on_host=config.offload_embeddings,
            )
        loss = scaled / self.scaler.get_scale() if self.scaler.is_enabled() else scaled
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        with phase("average over ranks"):
            average_gradients(parameters, self.ranks)
        with phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            grad_norm = clip_gradients(parameters, config.optim.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def _micro_batches(self, batch: PreparedBatch) -> tuple[list[MicroBatch], int]:
        """What passes through the towers, and how much of it, the last, keeps its graph; of divided towers as many
        and the same ones on all ranks."""
        sizes, lists = batch.micro_batch_tokens, [group.micro_batches for group in batch.groups]
        keep = self.graphs.keep(sizes)
        if is_sharded(self.towers):
            counts = [int(self.ranks.all_reduce_max(len(rows))) for rows in lists]
            lists = [
                rows + [np.empty(0, dtype=np.int64)] * (count - len(rows))
                for rows, count in zip(lists, counts, strict=True)
            ]
            keep = -int(self.ranks.all_reduce_max(-(sum(counts) if keep == len(sizes) else keep)))
        return [MicroBatch(group, rows) for group, some in zip(batch.groups, lists, strict=True) for rows in some], keep

    def _masks(self, batch: PreparedBatch, device: torch.device) -> dict[str, Tensor]:
        found = batch.false_negatives
        if found is None or not self.config.loss.masks_false_negatives or not found.any:
            return {}
        masks = {"query_ids": found.query_ids, "passage_ids": found.passage_ids, "excluded": found.excluded}
        return {name: to_device(torch.from_numpy(array), device) for name, array in masks.items()}


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for one step, unlike that of any other step or rank, or of a neighbouring seed."""
    words = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
