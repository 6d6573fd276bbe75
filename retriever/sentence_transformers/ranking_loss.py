"""The ranking loss for `SentenceTransformerTrainer` (Inf-CL, arXiv 2410.17243)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import cos_sim, dot_score, similarity_fct_name
from torch import Tensor, distributed, nn
from torch.nn.functional import normalize

from losses import InfCLLoss, inf_cl_loss
from losses.checks import check_bool
from losses.distributed.api import Exchange
from losses.distributed.communication import communication_of
from retriever.sentence_transformers import scale_checkpoint
from retriever.sentence_transformers.duplicate_texts import Masks, duplicate_masks, text_hashes

Direction = Literal["query_to_doc", "doc_to_query"]
Features = dict[str, Any]
_ONE_DIRECTION, _SYMMETRIC = {"query_to_doc"}, {"query_to_doc", "doc_to_query"}

# Before a trainer is created, because it copies the default callbacks.
scale_checkpoint.install()


class InfCLRankingLoss(nn.Module):
    """InfoNCE with in-batch and hard negatives, as a replacement for `MultipleNegativesRankingLoss`.

    For a batch without equal texts, value and gradients equal those of `MultipleNegativesRankingLoss` with the same
    arguments. The score matrix is never stored, so memory is linear in the batch (Cheng et al., arXiv 2410.17243). See
    `losses.inf_cl_loss` for the formula.

    The defaults differ in three ways: the scale is learned, equal texts are masked, and with several ranks all ranks'
    passages are negatives of all queries. With ``learn_scale=False, mask_duplicates=False,
    gather_across_devices=False`` the loss is that of `MultipleNegativesRankingLoss`.

    The batch is a list of columns, as the trainer passes it: queries (anchors) [M texts], positives [M], and any number
    of columns of hard negatives [M each], in all N = M · (columns − 1) passages. Labels are ignored. Texts may be
    padded, or packed end to end if the Transformer unpads (`cu_seq_lens_q`).

    **Several ranks.** With `gather_across_devices` the group is the default group of torch.distributed, if it is
    initialized and has more than one rank. The value is then that of the whole batch and the same on every rank.
    Gradients that are averaged over ranks, as DDP does, are those of the whole batch. Ranks may have different numbers
    of rows and columns. Every rank must call forward and backward. With several datasets, ranks may draw from
    different ones in the same step: if the scale is learned, pass the same loss object for all of them.

    **Learned scale.** The parameter `infonce.log_logit_scale` (0-dim, clamped as in Radford et al., arXiv 2103.00020)
    is optimized by the trainer, which includes the parameters of the loss. DDP does not include them, so the gradient
    of the scale, one number, is averaged over ranks in backward. Checkpoints store the value in `trainer_state.json`,
    from which a resumed run restores it; this is done by a callback of every transformers Trainer that is created after
    this module is imported. The learning rate of the scale is the trainer's `learning_rate`, unless it is set as in
    ``learning_rate_mapping={"log_logit_scale": 1e-3}``. The scale is subject to `weight_decay`, which is 0 by default.

    Args:
        model: the SentenceTransformer to train.
        scale: initial logit_scale, 1 / temperature. Default: 20.
        similarity_fct: `cos_sim` or `dot_score` of `sentence_transformers.util`. Default: `cos_sim`.
        gather_across_devices: whether the loss is over the batch of all ranks, rather than over the batch of each rank.
            Default: True.
        directions: ("query_to_doc",), or ("query_to_doc", "doc_to_query") for the symmetric loss. Default:
            ("query_to_doc",).
        partition_mode: "joint" or "per_direction". The symmetric loss requires "per_direction", one softmax for each
            direction. Default: "joint".
        learn_scale: whether the scale is learned. Default: True.
        max_scale: maximum of the scale; larger values are clamped. Default: 100.
        mask_duplicates: whether to mask false negatives: passages equal to the query's own positive, in any column, and
            passages equal to the positive of an equal query, on any rank. Texts are compared by their token ids, which
            takes 8 bytes per text on the host in each step. Columns of images or audio are refused. Default: True.
        exchange: how passages are exchanged between ranks: "ring" (one block at a time), "gather" (all at once) or
            "auto" (by size). The result is the same. Default: "auto".
        workspace_mib: memory of the loss in MiB, in addition to embeddings and their gradients. Default: 256.

    Raises:
        ValueError: an argument or a batch is not supported. The message names it.

    Example::

        from retriever.sentence_transformers import InfCLRankingLoss

        loss = InfCLRankingLoss(model)
        SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = True,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        *,
        learn_scale: bool = True,
        max_scale: float = 100.0,
        mask_duplicates: bool = True,
        exchange: Exchange = "auto",
        workspace_mib: float = 256,
    ) -> None:
        super().__init__()
        if similarity_fct not in (cos_sim, dot_score):
            found = similarity_fct_name(similarity_fct)
            raise ValueError(f"similarity_fct must be cos_sim or dot_score, found {found}")
        if set(directions) not in (_ONE_DIRECTION, _SYMMETRIC):
            raise ValueError(
                f'directions must be ("query_to_doc",) or ("query_to_doc", "doc_to_query"), found {directions}'
            )
        if partition_mode not in ("joint", "per_direction"):
            raise ValueError(f'partition_mode must be "joint" or "per_direction", found {partition_mode!r}')
        symmetric = set(directions) == _SYMMETRIC
        if symmetric and partition_mode == "joint":
            raise ValueError('partition_mode must be "per_direction" with two directions, found "joint"')
        for name, value in (("gather_across_devices", gather_across_devices), ("mask_duplicates", mask_duplicates)):
            check_bool(name, value)
        self.model = model
        self.infonce = InfCLLoss(
            logit_scale=scale,
            learnable=learn_scale,
            max_logit_scale=max_scale,
            symmetric=symmetric,
            exchange=exchange,
            workspace_mib=workspace_mib,
        )
        scale_checkpoint.register(self.infonce)
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.mask_duplicates = mask_duplicates

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            sentence_features: the features of each column: queries, positives, and columns of hard negatives.
            labels: ignored.

        Returns:
            0-dim loss.
        """
        columns = list(sentence_features)
        self._check_scale_of_ranks()
        masks = self._masks(columns)
        return self._loss(embed_columns(self.model, columns), masks, self._scale())

    def get_config_dict(self) -> dict[str, Any]:
        """Return the arguments for the model card, with the current scale."""
        return {
            "scale": self.scale,
            "similarity_fct": similarity_fct_name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "learn_scale": self.infonce.log_logit_scale.requires_grad,
            "max_scale": self.infonce.max_logit_scale,
            "mask_duplicates": self.mask_duplicates,
            "exchange": self.infonce.exchange,
        }

    @property
    def scale(self) -> float:
        """The current scale."""
        return float(self.infonce.logit_scale.detach())

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return 1 / self.scale

    @property
    def citation(self) -> str:
        return """
@misc{cheng2024breaking,
    title={Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss},
    author={Zesen Cheng and Hang Zhang and Kehan Li and Sicong Leng and Zhiqiang Hu and Fei Wu and Deli Zhao and Xin Li and Lidong Bing},
    year={2024},
    eprint={2410.17243},
    archivePrefix={arXiv},
    primaryClass={cs.CV}
}
"""  # noqa: E501

    def _group(self) -> Any:
        return distributed.group.WORLD if self.gather_across_devices and _has_several_ranks() else None

    def _masks(self, columns: list[Features]) -> Masks | None:
        """Mask equal texts. Must run before the model, because pooling without the prompt changes attention masks."""
        if len(columns) < 2:
            raise ValueError(f"expected columns of queries, positives and hard negatives, found {len(columns)} column")
        if not self.mask_duplicates:
            return None
        hashes = [text_hashes(column) for column in columns]
        _check_rows(hashes)
        return duplicate_masks(hashes, self._group())

    def _check_scale_of_ranks(self) -> None:
        """Check that all ranks use the same scale in this step, because its gradient is averaged over ranks."""
        if not _has_several_ranks():
            return
        learned = self.infonce.log_logit_scale.requires_grad
        index = scale_checkpoint.index_of(self.infonce) if learned else -1
        if (communication_of(distributed.group.WORLD).gather_host(torch.tensor([index])) != index).any():
            raise ValueError(
                "loss must be the same object for all datasets when its scale is learned on several ranks, found "
                "different ones in one step"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        scale_checkpoint.register(self.infonce)

    def _scale(self) -> Tensor:
        """The 0-dim logit_scale, with a gradient that is averaged over ranks."""
        scale = self.infonce.logit_scale
        return _AveragedGradient.apply(scale) if scale.requires_grad and _has_several_ranks() else scale

    def _loss(self, embeddings: list[Tensor], masks: Masks | None, scale: Tensor) -> Tensor:
        _check_rows(embeddings)
        query, *passages = embeddings
        passage = torch.cat(passages)
        if self.similarity_fct is cos_sim:
            query, passage = normalize(query, dim=1), normalize(passage, dim=1)
        return inf_cl_loss(
            query,
            passage,
            logit_scale=scale,
            symmetric=self.infonce.symmetric,
            group=self._group(),
            exchange=self.infonce.exchange,
            workspace_mib=self.infonce.workspace_mib,
            **({} if masks is None else vars(masks)),
        )


def _check_rows(columns: list[Tensor]) -> None:
    expected = len(columns[0])
    for column in columns:
        if len(column) != expected:
            raise ValueError(
                f"columns must have the same number of rows as the queries, expected {expected}, found {len(column)}"
            )


def _has_several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _AveragedGradient(torch.autograd.Function):
    """The identity, with a gradient that is averaged over the ranks of the default group."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        mean = upstream / distributed.get_world_size()
        distributed.all_reduce(mean)
        return mean
