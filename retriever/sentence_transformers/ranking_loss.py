"""The ranking loss for the trainer of sentence-transformers (Inf-CL, arXiv 2410.17243)."""

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
from losses.distributed.api import Exchange
from losses.distributed.communication import communication_of
from losses.inputs import check_bool
from retriever.sentence_transformers import scale_checkpoint
from retriever.sentence_transformers.duplicate_texts import Masks, duplicate_masks, text_hashes

Direction = Literal["query_to_doc", "doc_to_query"]
Features = dict[str, Any]
_ONE_DIRECTION, _SYMMETRIC = {"query_to_doc"}, {"query_to_doc", "doc_to_query"}

# Before a trainer is made: it takes the callbacks of that moment.
scale_checkpoint.install()


class InfCLRankingLoss(nn.Module):
    """InfoNCE over in-batch and hard negatives, in place of `MultipleNegativesRankingLoss` of sentence-transformers.

    Value and gradients are those of `MultipleNegativesRankingLoss` with the same arguments, where the batch has no
    equal texts. No matrix of scores is held: memory is linear in the batch (Cheng et al., arXiv 2410.17243). See
    `losses.inf_cl_loss` for the formula.

    Other than there by default, the scale is learned, equal texts are masked, and in training on several ranks all
    ranks' passages are negatives of all queries. ``learn_scale=False, mask_duplicates=False,
    gather_across_devices=False`` gives their loss.

    The batch is a list of columns, as their trainer gives it: queries (anchors) [M texts], positives [M], and any
    number of columns of hard negatives [M each], N = M · (columns − 1) passages in all. Labels are ignored. Texts may
    be padded, or laid end to end where their Transformer unpads (`cu_seq_lens_q`).

    **Several ranks.** With `gather_across_devices` the group is torch.distributed's default group, where it is
    initialized and has more than one rank. The value is then that of the whole batch and the same on every rank;
    gradients, averaged over ranks as DDP does, are those of the whole batch. Ranks may have different numbers of rows
    and columns. Every rank calls forward and backward. Where several data sets train together, ranks draw different
    ones in the same step: give all of them the same loss object, if its scale is learned.

    **Learned scale.** The parameter `infonce.log_logit_scale` (0-dim, clamped as in Radford et al., arXiv 2103.00020)
    is in the optimizer of their trainer, since that takes the parameters of the loss. DDP does not know it: its
    gradient is averaged over ranks in backward, one number. Checkpoints of their trainer hold its value in
    `trainer_state.json`, and a run that resumes from one goes on from that value; a transformers Trainer made after the
    import of this module has the callback for it. It learns at the trainer's `learning_rate` unless
    ``learning_rate_mapping={"log_logit_scale": 1e-3}`` says otherwise, and is subject to `weight_decay`, which is 0 by
    default.

    Args:
        model: the SentenceTransformer that is trained.
        scale: logit_scale = 1 / temperature at the beginning. Default: 20.
        similarity_fct: `cos_sim` (default) or `dot_score` of `sentence_transformers.util`.
        gather_across_devices: compute the loss over the whole batch of all ranks (default); if not, every rank has the
            loss of its own batch.
        directions: ("query_to_doc",) (default), or ("query_to_doc", "doc_to_query") for the symmetric loss.
        partition_mode: "joint" (default) or "per_direction"; the symmetric loss needs "per_direction", one softmax for
            each direction.
        learn_scale: train the scale. Default: True.
        max_scale: the loss sees no larger scale. Default: 100.
        mask_duplicates: leave out false negatives (default): passages equal to the query's own positive, in whichever
            column, and passages equal to the positive of an equal query, on whichever rank. Texts are compared by
            their token ids, 8 bytes a text on the host each step; columns of images or audio are refused.
        exchange: how passages travel between ranks: "ring" (a block at a time), "gather" (all at once) or "auto"
            (default): as memory allows. The result is the same.
        workspace_mib: MiB that the loss may take beside embeddings and their gradients. Default: 256.

    Raises:
        ValueError: an argument or a batch that this loss cannot honour; the message names it.

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
        scale_checkpoint.remember(self.infonce)
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.mask_duplicates = mask_duplicates

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: features of each column: queries, positives, and columns of hard negatives.
            labels: ignored.

        Returns:
            0-dim loss.
        """
        columns = list(sentence_features)
        self._check_scale_of_ranks()
        masks = self._masks(columns)
        return self._loss(embed_columns(self.model, columns), masks, self._scale())

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card; the scale as it is now."""
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
        """The scale as it is now."""
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
        return distributed.group.WORLD if self.gather_across_devices and _several_ranks() else None

    def _masks(self, columns: list[Features]) -> Masks | None:
        """Before the model sees the features: a pooling without the prompt changes their attention masks."""
        if len(columns) < 2:
            raise ValueError(f"expected columns of queries, positives and hard negatives, found {len(columns)} column")
        if not self.mask_duplicates:
            return None
        hashes = [text_hashes(each) for each in columns]
        _check_rows(hashes)
        return duplicate_masks(hashes, self._group())

    def _check_scale_of_ranks(self) -> None:
        """Gradients of several scales are not averaged as if they were those of one."""
        if not _several_ranks():
            return
        learned = self.infonce.log_logit_scale.requires_grad
        own = scale_checkpoint.number_of(self.infonce) if learned else -1
        if (communication_of(distributed.group.WORLD).gather_host(torch.tensor([own])) != own).any():
            raise ValueError(
                "loss must be the same object for all data sets when its scale is learned on several ranks, found "
                "ranks with several in one step"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        scale_checkpoint.remember(self.infonce)

    def _scale(self) -> Tensor:
        """0-dim logit_scale, whose gradient is averaged over ranks."""
        scale = self.infonce.logit_scale
        return _AveragedGradient.apply(scale) if scale.requires_grad and _several_ranks() else scale

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
            raise ValueError(f"columns must have as many rows as the queries, expected {expected}, found {len(column)}")


def _several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _AveragedGradient(torch.autograd.Function):
    """A value as it is; its gradient is averaged over the ranks of the default group."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        mean = upstream / distributed.get_world_size()
        distributed.all_reduce(mean)
        return mean
