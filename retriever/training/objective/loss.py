"""Build the loss of a training run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from losses import InfCLLoss, Matryoshka, SigmoidLoss, gathered_clip_loss
from retriever.config.loss import LossConfig
from retriever.config.loss_options import MatryoshkaConfig
from retriever.config.run import TrainConfig
from retriever.distributed.ranks import Ranks
from retriever.errors import ConfigError
from retriever.training.objective.sources import SourceLosses, source_loss


class DistributedClipLoss(InfCLLoss):
    """The loss of CLIP over several ranks, with the full matrix on every rank."""

    def forward(
        self,
        query: Tensor,
        passage: Tensor,
        *,
        positive: Tensor | None = None,
        excluded: Tensor | None = None,
        query_ids: Tensor | None = None,
        passage_ids: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Compute the loss with row i of `passage` as the positive of row i of `query`.

        As its paper defines it: positives, ids and excluded pairs are ignored.

        Raises:
            ValueError: If another option of `InfCLLoss` is given.
        """
        for name, value in {**options, "matryoshka": self.matryoshka}.items():
            if value is not None and value is not False:
                raise ValueError(f"{name}: expected none, because the loss clip does not have it")
        return gathered_clip_loss(query, passage, logit_scale=self.logit_scale, group=self.group)


def check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raise a ConfigError for settings that several ranks do not support."""
    if ranks.world_size == 1:
        return
    if config.batch_size < ranks.world_size:
        raise ConfigError(
            f"batch_size: expected at least {ranks.world_size}, one query per process, found {config.batch_size}"
        )
    if config.loss.name == "clip" and config.data.negatives:
        raise ConfigError(f"data.negatives: expected none for clip with {ranks.world_size} processes")
    if config.loss.implementation in ("full", "dense"):
        raise ConfigError(
            f"loss.implementation: expected auto, chunked or triton with {ranks.world_size} processes, "
            f"found {config.loss.implementation}"
        )


def build_losses(config: TrainConfig, ranks: Ranks) -> InfCLLoss | SigmoidLoss | SourceLosses:
    """Build the loss module of a run; that of `SourceLosses` if a source has its own logit_scale."""
    own = {
        number: build_loss(source_loss(config.loss, source), ranks)
        for number, source in enumerate(config.data.listed)
        if source.loss.logit_scale is not None
    }
    loss = build_loss(config.loss, ranks)
    return SourceLosses(loss, own) if own else loss


def build_loss(config: LossConfig, ranks: Ranks) -> InfCLLoss | SigmoidLoss:
    """Build the loss module of a configuration, over all ranks."""
    if config.name == "sigmoid":
        # LossConfig refuses "dense", which SigmoidLoss does not have.
        implementation: Any = config.implementation
        return SigmoidLoss(
            logit_scale=config.logit_scale,
            logit_bias=config.logit_bias,
            learnable=config.learn_logit_scale,
            max_logit_scale=config.max_logit_scale,
            group=ranks.group,
            implementation=implementation,
            precision=config.precision,
            workspace_mib=config.workspace_mib,
        )
    loss_class = DistributedClipLoss if config.name == "clip" and ranks.group is not None else InfCLLoss
    return loss_class(
        logit_scale=config.logit_scale,
        learnable=config.learn_logit_scale,
        max_logit_scale=config.max_logit_scale,
        group=ranks.group,
        symmetric=config.symmetric or config.name == "clip",
        matryoshka=_matryoshka(config.matryoshka),
        implementation="full" if config.name == "clip" else config.implementation,
        precision=config.precision,
        exchange=config.exchange,
        workspace_mib=config.workspace_mib,
    )


def _matryoshka(config: MatryoshkaConfig) -> Matryoshka | None:
    return Matryoshka(config.dims, config.weights or None) if config.given else None
