"""The ranking loss for the trainer of sentence-transformers, with a gradient cache (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
from sentence_transformers.util import cos_sim
from torch import Tensor

from retriever.sentence_transformers.duplicate_texts import Masks
from retriever.sentence_transformers.ranking_loss import Direction, Features, InfCLRankingLoss


@dataclass
class _CachedBatch:
    """What the loss of a batch needs besides the embeddings. `scale` is a leaf tensor, which receives a gradient."""

    masks: Masks | None
    scale: Tensor


class CachedInfCLRankingLoss(CachedLossMixin, InfCLRankingLoss):
    """`InfCLRankingLoss` with a gradient cache, in place of `CachedMultipleNegativesRankingLoss`.

    The batch passes through the model twice, in mini-batches (GradCache, Gao et al., arXiv 2101.06983). The first pass
    computes the embeddings without an autograd graph. When the loss has given the gradient at each embedding, the
    second pass computes the embeddings with a graph and backpropagates these gradients. Only the activations of one
    mini-batch are in memory at a time. The result is exact, dropout included: the second pass of a mini-batch starts
    from the random state of its first pass, under the same autocast.

    **One all-reduce per step.** The second passes run in the backward of the returned loss. All but the last are in
    DDP's `no_sync`, so DDP averages the sums of all mini-batches once. If the trainer accumulates gradients, its own
    `no_sync` around a whole step applies to the last mini-batch, too. The number of mini-batches may differ between
    ranks.

    Args:
        model: As in `InfCLRankingLoss`.
        scale: As in `InfCLRankingLoss`. Default: 20.
        similarity_fct: As in `InfCLRankingLoss`. Default: `cos_sim`.
        mini_batch_size: Texts per mini-batch. Default: 32.
        mini_batch_num_tokens: Maximum number of tokens per mini-batch, without padding, instead of `mini_batch_size`.
            A longer text is a mini-batch of its own. Default: None.
        gather_across_devices: As in `InfCLRankingLoss`. Default: True.
        directions: As in `InfCLRankingLoss`. Default: ("query_to_doc",).
        partition_mode: As in `InfCLRankingLoss`. Default: "joint".
        show_progress_bar: Whether each pass over the mini-batches shows a progress bar. Default: False.
        **options: The keyword-only arguments of `InfCLRankingLoss`.

    Raises:
        ValueError: As in `InfCLRankingLoss`, and if the model begins with a StaticEmbedding, whose inputs cannot be
            divided into mini-batches.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = True,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, scale, similarity_fct, gather_across_devices, directions, partition_mode, **options)
        if has_static_embedding_input(model):
            raise ValueError("model must not begin with a StaticEmbedding: use InfCLRankingLoss")
        name, value = "mini_batch_size", mini_batch_size
        if mini_batch_num_tokens is not None:
            name, value = "mini_batch_num_tokens", mini_batch_num_tokens
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, found {value!r:.40}")
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """Return the loss of a batch, as in `InfCLRankingLoss`. Its backward runs the second passes."""
        columns = list(sentence_features)
        self._check_scale_of_ranks()
        batch = _CachedBatch(self._masks(columns), self.infonce.logit_scale.detach())
        learned = self.infonce.log_logit_scale.requires_grad and torch.is_grad_enabled()
        batch.scale.requires_grad_(learned)
        weights = getattr(self.calculate_loss, "matryoshka_weights", ())
        if learned and any(weight != 1 for weight in weights):
            # MatryoshkaLoss weights the gradients of the embeddings after calculate_loss, but not that of the scale.
            raise ValueError(f"learn_scale must be False under MatryoshkaLoss with weights {weights}")
        given: Any = batch  # sentence-transformers passes its argument `labels` on to calculate_loss unchanged
        loss = self.forward_cached(columns, given)
        return _WithScale.apply(loss, self._scale(), batch.scale.grad) if learned else loss

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """Return the loss of the embeddings [n, D] of each column's mini-batches; with_backward also runs backward."""
        batch = labels if isinstance(labels, _CachedBatch) else _CachedBatch(None, self.infonce.logit_scale)
        loss = self._loss([torch.cat(column) for column in reps], batch.masks, batch.scale)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss

    def embed_minibatch(
        self,
        sentence_feature: Features,
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: Any = None,
    ) -> tuple[Tensor, Any]:
        """Embed a mini-batch; a second pass is given the random state of its first, and runs under its autocast."""
        with contextlib.nullcontext() if random_state is None else random_state.autocast():
            embedding, state = super().embed_minibatch(
                sentence_feature, begin, end, with_grad, copy_random_state, random_state
            )
        if copy_random_state:
            first: Any = state
            first.autocast = _current_autocast(embedding.device.type)
        return embedding, state

    def get_config_dict(self) -> dict[str, Any]:
        """Return the arguments for the model card, with the current scale."""
        sizes = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return super().get_config_dict() | sizes

    @property
    def citation(self) -> str:
        return (
            super().citation
            + """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""
        )


def _current_autocast(device: str) -> Callable[[], Any]:
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


class _WithScale(torch.autograd.Function):
    """A loss whose gradient at the scale is already known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream, (upstream * gradient).to(gradient.dtype), None
