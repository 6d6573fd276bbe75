"""The loss of a training run, and what several processes can compute of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from losses import InfCLLoss, SigmoidLoss, gathered_clip_loss
from losses.options import Teacher, TeacherScores
from retriever.config.run import LossConfig, TrainConfig
from retriever.distributed.ranks import Ranks
from retriever.errors import ConfigError


class ClipOverRanks(InfCLLoss):
    """CLIP's loss with the whole matrix on every rank; the baseline of the literature."""

    def forward(
        self,
        query: Tensor,
        passage: Tensor,
        *,
        positive: Tensor | None = None,
        excluded: Tensor | None = None,
        teacher: Teacher | TeacherScores | None = None,
        query_ids: Tensor | None = None,
        passage_ids: Tensor | None = None,
    ) -> Tensor:
        """As its paper has it: row i with row i, and no ids."""
        if teacher is not None:
            raise ValueError("teacher: expected none for the loss clip, which distils nothing")
        return gathered_clip_loss(query, passage, logit_scale=self.logit_scale, group=self.group)


def check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse what several ranks cannot do (ConfigError, naming the field)."""
    if ranks.size == 1:
        return
    if config.batch_size < ranks.size:
        raise ConfigError(f"batch_size: expected at least {ranks.size}, one query a process, found {config.batch_size}")
    if config.loss.name == "clip" and config.data.negatives:
        raise ConfigError(f"data.negatives: expected none for clip with {ranks.size} processes")
    if config.loss.implementation in ("full", "dense"):
        raise ConfigError(
            f"loss.implementation: expected auto, chunked or triton with {ranks.size} processes, "
            f"found {config.loss.implementation}"
        )


def build_loss(config: LossConfig, ranks: Ranks) -> InfCLLoss | SigmoidLoss:
    """The loss module that a configuration names, over all ranks."""
    if config.name == "sigmoid":
        # The configuration refuses "dense", which the sigmoid loss does not have.
        chosen: Any = config.implementation
        return SigmoidLoss(
            logit_scale=config.logit_scale,
            logit_bias=config.logit_bias,
            learnable=config.learn_logit_scale,
            max_logit_scale=config.max_logit_scale,
            group=ranks.group,
            implementation=chosen,
            precision=config.precision,
            workspace_mib=config.workspace_mib,
        )
    made = ClipOverRanks if config.name == "clip" and ranks.group is not None else InfCLLoss
    return made(
        logit_scale=config.logit_scale,
        learnable=config.learn_logit_scale,
        max_logit_scale=config.max_logit_scale,
        group=ranks.group,
        symmetric=config.symmetric or config.name == "clip",
        implementation="full" if config.name == "clip" else config.implementation,
        precision=config.precision,
        exchange=config.exchange,
        workspace_mib=config.workspace_mib,
    )
