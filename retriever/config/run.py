"""The configuration of a training run, as frozen dataclasses that check their values.

The docstrings of the fields are the help texts of `retriever train`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Suppress

from retriever.config.images import ImageConfig, ImageSource
from retriever.config.sources import SourceConfig


@dataclass(frozen=True)
class ModelConfig:
    """The towers: their weights, pooling and prompts."""

    name: str = ""
    """A sentence-transformers model or a Hugging Face encoder, as a local path or a hub name. Empty: a new model, see
    model.architecture."""
    architecture: Annotated[dict[str, Any] | None, Suppress] = None
    """Train a new model from scratch: the fields of a Hugging Face configuration, including `model_type`. YAML only."""
    tokenizer: str | None = None
    """Tokenizer of a model from scratch, as a local path or a hub name. None: the tokenizer of model.name."""
    pooling: Literal["mean", "cls", "lasttoken"] | None = None
    """How the token vectors of a text are pooled into one. None: as saved with the model, otherwise the last token for
    a causal language model and the mean for any other encoder, as in sentence-transformers."""
    projection: int | None = None
    """Output dimension of a linear projection after pooling. None: no projection."""
    normalize: bool = True
    """Normalize embeddings to unit length. A model that was saved with normalization always normalizes."""
    shared: bool = True
    """Use one tower for queries and passages. False: two towers, initialized with the same weights."""
    max_length: int | None = None
    """Maximum length of a query or passage, in tokens; longer texts are truncated. None: the limits of the model."""
    dropout: float | None = None
    """Dropout probability of all layers of the towers in training. None: as configured in the model."""
    query_prompt: str | None = None
    """Text that is put before every query and is saved with the model. None: the prompt of the model."""
    passage_prompt: str | None = None
    """Text that is put before every passage and is saved with the model. None: the prompt of the model."""
    image: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self) -> None:
        _check_at_least(self, "model.", 1, "projection", "max_length")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected a number from 0 to below 1, found {self.dropout}")


@dataclass(frozen=True)
class DataConfig:
    """The training data."""

    sources: tuple[SourceConfig, ...] = ()
    """Sources of text pairs. Each batch comes from one source, drawn in proportion to the weights."""
    images: tuple[ImageSource, ...] = ()
    """Sources of images with captions, instead of data.sources, for a model with an image tower."""
    negatives: int = 0
    """Number of hard negatives per query, from the `negatives` column of each source."""
    workers: int = 1
    """Number of processes that load and tokenize batches in the background. 0: load in the main process. The order of
    the data does not depend on it."""
    cache: str | None = None
    """Folder of the memory-mapped copies of the sources. None: a folder inside the run folder."""

    def __post_init__(self) -> None:
        _check_at_least(self, "data.", 0, "negatives", "workers")


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss."""

    name: Literal["inf_cl", "sigmoid", "clip"] = "inf_cl"
    """inf_cl: InfoNCE in tiles, with memory linear in the batch. sigmoid: SigLIP's pairwise loss, also with linear
    memory; its paper starts with logit_scale 10 and learns it. clip: symmetric InfoNCE on the full matrix, as in
    CLIP."""
    symmetric: bool = False
    """Add the loss from passages to queries: each positive passage is classified among all queries of the batch."""
    logit_scale: float = 20.0
    """Initial logit scale, 1 / temperature."""
    learn_logit_scale: bool = False
    """Learn the logarithm of the logit scale with the towers. False: the scale is constant."""
    max_logit_scale: float = 100.0
    """Maximum of the logit scale; larger values are clamped."""
    logit_bias: float = -10.0
    """Initial bias of the logits of the sigmoid loss. It is learned if learn_logit_scale is true."""
    implementation: Literal["auto", "full", "dense", "chunked", "triton"] = "auto"
    """How inf_cl and sigmoid are computed. full: the full matrix in PyTorch. dense: the full matrix in Triton kernels,
    only for inf_cl. chunked: tiles in PyTorch. triton: tiles in Triton kernels. auto: chosen by device and batch
    size."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Precision of the operands of the loss's matrix products; sums are in fp32. auto: the precision of the towers."""
    workspace_mib: int = 256
    """Memory of the loss for tiles and temporaries, in MiB, in addition to embeddings and their gradients."""
    exchange: Literal["auto", "ring", "gather"] = "auto"
    """How processes exchange passages for inf_cl. ring: block by block, with the least memory. gather: all at once.
    auto: gather with two processes or if the passages fit in workspace_mib, otherwise ring."""
    mask_duplicates: bool = True
    """Mask false negatives for inf_cl and sigmoid: a passage that any row of the sources pairs with a query's text is
    not a negative of that query. Texts that differ only in white space are equal. (If a batch has more than 4,194,304
    such pairs and more than 32 per query, all passages that are connected through shared queries are masked.)"""

    def __post_init__(self) -> None:
        if not _is_positive(self.max_logit_scale):
            raise ValueError(f"loss.max_logit_scale: expected a positive number, found {self.max_logit_scale}")
        if not 0 < self.logit_scale <= self.max_logit_scale:
            raise ValueError(
                f"loss.logit_scale: expected a number over 0 and at most max_logit_scale "
                f"({self.max_logit_scale}), found {self.logit_scale}"
            )
        if not math.isfinite(self.logit_bias):
            raise ValueError(f"loss.logit_bias: expected a number, found {self.logit_bias}")
        if self.name == "sigmoid" and self.implementation == "dense":
            raise ValueError("loss.implementation: expected auto, full, chunked or triton for the sigmoid loss")
        _check_at_least(self, "loss.", 1, "workspace_mib")

    @property
    def masks_false_negatives(self) -> bool:
        """Whether false negatives are masked. The clip loss masks none, as in the literature."""
        return self.mask_duplicates and self.name != "clip"


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning rate schedule."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """adamw, or adafactor with factored second moments and a first moment in bf16: about a quarter of AdamW's
    memory."""
    lr: float = 2e-5
    """Peak learning rate, after the warm-up. Typical values: 1e-5 to 5e-5 for fine-tuning, 1e-4 to 1e-3 from
    scratch."""
    weight_decay: float = 0.01
    """Decoupled weight decay, multiplied by the learning rate. Biases, norms and logit_scale are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment. Typical values: 0.9 0.98 for contrastive pre-training, 0.9 0.95 for
    Adafactor."""
    eps: float | None = None
    """Term in the denominator of the update for numerical stability. None: 1e-8 for adamw, 1e-30 for adafactor."""
    warmup_fraction: float = 0.1
    """Fraction of all steps, 0 to 1, in which the learning rate rises linearly from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up. cosine, linear: falls to zero at the last step. constant: does not fall."""
    max_grad_norm: float | None = 1.0
    """Maximum L2 norm of the gradient of all parameters; larger gradients are scaled down. None: no clipping."""

    def __post_init__(self) -> None:
        eps, norm = self.eps, self.max_grad_norm
        checks = {
            "name": (self.name in ("adamw", "adafactor"), "adamw or adafactor"),
            "lr": (_is_positive(self.lr), "a positive number"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "betas": (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers from 0 to below 1"),
            "eps": (eps is None or _is_positive(eps), "a positive number"),
            "warmup_fraction": (0 <= self.warmup_fraction <= 1, "a fraction from 0 to 1"),
            "schedule": (self.schedule in ("cosine", "linear", "constant"), "cosine, linear or constant"),
            "max_grad_norm": (norm is None or _is_positive(norm), "a positive number"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise ValueError(f"optim.{name}: expected {expected}, found {getattr(self, name)}")


@dataclass(frozen=True)
class DevConfig:
    """Evaluation during training. The model with the best score is kept."""

    path: str = ""
    """BEIR folder; for a model with an image tower, a data set of `retriever evaluate zero-shot`. Empty: no evaluation,
    and the last model is kept."""
    split: str = "dev"
    """Split: the name of the qrels file in a BEIR folder, or of the folder in an image data set."""
    every: int = 500
    """Steps between evaluations. The last step is always followed by one."""
    patience: int | None = None
    """Stop after this many consecutive evaluations without a better nDCG@10 (images: recall@1, acc1 or mean average
    precision). None: train all steps."""
    max_queries: int | None = None
    """Number of queries to evaluate, the first ones sorted by id, against the full corpus. None: all queries."""
    keep_identical_ids: bool = False
    """Keep passages that have the id of their query and are not judged for it, as trec_eval does. False: remove them,
    as BEIR does."""

    def __post_init__(self) -> None:
        _check_at_least(self, "dev.", 1, "every", "patience", "max_queries")


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run. The defaults suit fine-tuning of a small encoder."""

    out: str = "runs/retriever"
    """Folder of the run, for config.yaml, metrics.jsonl, checkpoints/ and model/."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    dev: DevConfig = field(default_factory=DevConfig)
    batch_size: int = 256
    """Number of queries per optimizer step, over all processes. The passages of the other queries are negatives. Of
    several sources, one with fewer rows gives smaller batches, each of which is the whole source."""
    epochs: float = 1.0
    """Number of passes over the data. Ignored if steps is given."""
    steps: int | None = None
    """Number of optimizer steps. None: given by epochs."""
    seed: int = 0
    """Random seed of the data order, dropout and new weights, 0 to 2^64 - 1."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …. auto: cuda if available, otherwise cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision in which the towers compute; weights and optimizer state are in fp32. auto: bf16 if the hardware
    supports it natively, otherwise fp32."""
    micro_batch_tokens: int | None = None
    """Maximum number of tokens in a micro-batch, including padding; bounds the memory of activations. None: 4096 on a
    CPU, as many as fit in free memory on a GPU."""
    offload_embeddings: bool = False
    """Keep embeddings and their gradients in host memory before and after the loss, for larger batches on a GPU."""
    shard_towers: bool = False
    """Shard weights, gradients and AdamW state of the encoders over the processes (FSDP2), for towers that do not fit
    on one GPU. Slower than unsharded towers; no effect with one process."""
    compile: bool = False
    """Compile the layers of the towers with torch.compile: some seconds at the start, then faster steps on a GPU."""
    cuda_graphs: bool = False
    """Run micro-batches of up to 32,768 tokens as CUDA graphs. Faster if batches are so small that the GPU waits for
    the host; only in bf16."""
    gradient_checkpointing: bool = False
    """Recompute activations of the towers in backward: less memory, about a third more time."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    tensorboard: bool = False
    """Write TensorBoard event files to the run folder, too."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "steps", "micro_batch_tokens", "log_every", "checkpoint_every", "keep_checkpoints")
        _check_at_least(self, "", 1, *counts)
        _check_at_least(self, "", 0, "seed")
        if self.seed >= 2**64:
            raise ValueError(f"seed: expected a number below 2^64, found {self.seed}")
        if self.batch_size == 1 and not self.data.negatives and self.loss.name != "sigmoid":
            raise ValueError(
                "batch_size: expected at least 2, or data.negatives, found 1: a query needs passages other than its own"
            )
        if not _is_positive(self.epochs):
            raise ValueError(f"epochs: expected a positive number, found {self.epochs}")
        if self.shard_towers and self.precision == "fp16":
            raise ValueError("precision: expected auto, bf16 or fp32 with shard_towers, found fp16")
        if self.shard_towers and self.optim.name == "adafactor":
            raise ValueError("optim.name: expected adamw with shard_towers, found adafactor")
        for name in ("compile", "gradient_checkpointing", "shard_towers"):
            if self.cuda_graphs and getattr(self, name):
                raise ValueError(f"{name}: expected false with cuda_graphs, found true")
        if self.cuda_graphs and self.model.image.name:
            raise ValueError("cuda_graphs: expected false with an image tower, found true")


def _check_at_least(config: object, prefix: str, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{prefix}{name}: expected at least {minimum}, found {value}")


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf
