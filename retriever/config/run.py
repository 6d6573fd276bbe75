"""What a training run is: frozen dataclasses, each of which refuses what cannot be meant."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Suppress

from retriever.config.images import ImageConfig, ImageSource
from retriever.config.sources import SourceConfig


@dataclass(frozen=True)
class ModelConfig:
    """The towers: where their weights come from and how a text becomes one vector."""

    name: str = ""
    """A sentence-transformers folder, or a Hugging Face encoder: a local path or a hub name."""
    architecture: Annotated[dict[str, Any] | None, Suppress] = None
    """From scratch instead: the fields of a Hugging Face configuration, `model_type` among them (YAML only)."""
    tokenizer: str | None = None
    """Tokenizer of a from-scratch model: a local path or a hub name."""
    pooling: Literal["mean", "cls", "lasttoken"] | None = None
    """How token vectors become one; empty keeps what the folder says. Of a plain encoder that is the mean, and the last
    token of a causal language model, as in sentence-transformers."""
    projection: int | None = None
    """Dimensions of a linear projection after pooling; empty for none."""
    normalize: bool = True
    """Scale embeddings to unit length (a folder that already does keeps doing so)."""
    shared: bool = True
    """One tower for queries and passages, or two that start from the same weights."""
    max_length: int | None = None
    """Longest text in tokens, query or passage; empty keeps the model's own limits."""
    dropout: float | None = None
    """Dropout while training, everywhere in the towers; empty keeps the model's own."""
    query_prompt: str | None = None
    """Text before every query, saved with the model; empty keeps the folder's."""
    passage_prompt: str | None = None
    """Text before every passage, saved with the model; empty keeps the folder's."""
    image: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self) -> None:
        _check_least(self, "model.", 1, "projection", "max_length")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected a number from 0 to below 1, found {self.dropout}")


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from."""

    sources: tuple[SourceConfig, ...] = ()
    """The sources; each batch is drawn from one of them, chosen by weight."""
    images: tuple[ImageSource, ...] = ()
    """Sources of pictures with captions instead, for a model with an image tower."""
    negatives: int = 0
    """Hard negatives a query, from the sources' `negatives` columns."""
    workers: int = 1
    """Processes that read and tokenize ahead; 0 for none. The order of the data does not depend on it."""
    cache: str | None = None
    """Folder for the memory-mapped copies of the sources; empty for one inside the run."""

    def __post_init__(self) -> None:
        _check_least(self, "data.", 0, "negatives", "workers")


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss."""

    name: Literal["inf_cl", "sigmoid", "clip"] = "inf_cl"
    """inf_cl: tiled, memory linear in the batch. sigmoid: SigLIP's, a decision for each pair, as lean; its paper begins
    with logit_scale 10 and learns it. clip: the full matrix, symmetric; the baseline of the literature."""
    symmetric: bool = False
    """Also classify each passage's query among all queries."""
    logit_scale: float = 20.0
    """Initial 1/temperature."""
    learn_logit_scale: bool = False
    """Train the scale with the towers, in the log domain."""
    max_logit_scale: float = 100.0
    """Upper clamp of the scale."""
    logit_bias: float = -10.0
    """Of the sigmoid loss: what is added to every logit at first; trained where the scale is."""
    implementation: Literal["auto", "full", "dense", "chunked", "triton"] = "auto"
    """How inf_cl and sigmoid are computed; auto chooses by device and size (dense: inf_cl alone)."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Operands of the loss's matrix products; accumulation is fp32."""
    workspace_mib: int = 256
    """Memory for the tiles of the similarity matrix, in MiB."""
    exchange: Literal["auto", "ring", "gather"] = "auto"
    """How several processes share passages for inf_cl: round a ring, the least memory for many of them, or all at once;
    auto chooses by size."""
    mask_duplicates: bool = True
    """A passage that any row of the sources gives as a positive of a query's text is no negative of that query, for
    inf_cl and sigmoid; texts that differ in spacing alone are the same. (Where a batch holds more than 4,194,304 such
    pairs, and more than 32 a query, passages that are connected by shared queries are left out as a whole.)"""

    def __post_init__(self) -> None:
        if not _positive(self.max_logit_scale):
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
        _check_least(self, "loss.", 1, "workspace_mib")

    @property
    def masks_false_negatives(self) -> bool:
        """The literature's CLIP loss counts every other passage of the batch as a negative."""
        return self.mask_duplicates and self.name != "clip"


@dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """adamw; or adafactor: factored second moments and a bf16 first moment, about a quarter of AdamW's memory."""
    lr: float = 2e-5
    """Learning rate at the end of the warm-up (fine-tuning: 1e-5 to 5e-5; from scratch: 1e-4 to 1e-3)."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices, times the learning rate (biases, norms and logit_scale have none)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment (contrastive pre-training: 0.9 0.98; Adafactor's recipe: 0.9 0.95)."""
    eps: float | None = None
    """Added against division by zero (none: 1e-8 for adamw, 1e-30 for adafactor)."""
    warmup_fraction: float = 0.1
    """Part of all steps in which the learning rate rises from zero, 0 to 1."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up: to zero at the last step, or not at all."""
    max_grad_norm: float | None = 1.0
    """Gradients of a larger L2 norm over all parameters are scaled down to it (none: never)."""

    def __post_init__(self) -> None:
        eps, norm = self.eps, self.max_grad_norm
        checks = {
            "name": (self.name in ("adamw", "adafactor"), "adamw or adafactor"),
            "lr": (_positive(self.lr), "a positive number"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "betas": (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers from 0 to below 1"),
            "eps": (eps is None or _positive(eps), "a positive number"),
            "warmup_fraction": (0 <= self.warmup_fraction <= 1, "a fraction from 0 to 1"),
            "schedule": (self.schedule in ("cosine", "linear", "constant"), "cosine, linear or constant"),
            "max_grad_norm": (norm is None or _positive(norm), "a positive number"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise ValueError(f"optim.{name}: expected {expected}, found {getattr(self, name)}")


@dataclass(frozen=True)
class DevConfig:
    """Evaluation while training; the model that does best on it is the one kept."""

    path: str = ""
    """BEIR folder, or a set of pictures as `retriever evaluate zero-shot` reads them for a model with an image tower;
    empty for no evaluation, and the last model is kept."""
    split: str = "dev"
    """Which qrels of the folder, or which folder in a set of pictures."""
    every: int = 500
    """Steps between evaluations; one follows the last step in any case."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a better nDCG@10 (or recall@1, acc1); empty for never."""
    max_queries: int | None = None
    """Evaluate on the first so many queries of the split, by id; the corpus is always whole."""
    keep_identical_ids: bool = False
    """Rank passages that have their query's id and are not judged for it; BEIR leaves them out, trec_eval does not."""

    def __post_init__(self) -> None:
        _check_least(self, "dev.", 1, "every", "patience", "max_queries")


@dataclass(frozen=True)
class TrainConfig:
    """Train a dense retriever. Defaults suit fine-tuning a small encoder; `--help` lists every field."""

    out: str = "runs/retriever"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, model/."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    dev: DevConfig = field(default_factory=DevConfig)
    batch_size: int = 256
    """Queries an optimizer step; every other passage of the batch is a negative. A batch comes from one source; beside
    others, a source of fewer rows gives smaller batches, each the whole source."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    seed: int = 0
    """Of data order, dropout and new weights."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the towers, over fp32 weights and optimizer. auto: bf16 where the hardware has it, else fp32."""
    micro_batch_tokens: int | None = None
    """Tokens, padding included, that pass through the towers at once; bounds the memory of activations.
    Empty: 4096 on a CPU, what free memory allows on a GPU."""
    offload_embeddings: bool = False
    """Embeddings and gradients wait on the host before and after the loss: larger batches on a GPU."""
    shard_towers: bool = False
    """Divide weights, gradients and AdamW of the towers' encoders among the processes (FSDP2), for towers that do not
    fit one GPU; slower than whole ones, which is what one process has in any case."""
    compile: bool = False
    """Compile the towers' layers by torch.compile: some seconds at the start, then faster steps on a GPU."""
    cuda_graphs: bool = False
    """Launch the towers' passes of up to 32,768 tokens as CUDA graphs: faster where batches are so small that a GPU
    waits for its host; in bf16 alone."""
    gradient_checkpointing: bool = False
    """Recompute activations inside the towers: less memory, about a third more time."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest."""
    tensorboard: bool = False
    """Also write TensorBoard event files to the run's folder."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "steps", "micro_batch_tokens", "log_every", "checkpoint_every", "keep_checkpoints")
        _check_least(self, "", 1, *counts)
        _check_least(self, "", 0, "seed")
        if self.seed >= 2**64:
            raise ValueError(f"seed: expected a number below 2^64, found {self.seed}")
        if self.batch_size == 1 and not self.data.negatives and self.loss.name != "sigmoid":
            raise ValueError(
                "batch_size: expected at least 2, or data.negatives, found 1: a query needs passages other than its own"
            )
        if not _positive(self.epochs):
            raise ValueError(f"epochs: expected a positive number, found {self.epochs}")
        if self.shard_towers and self.precision == "fp16":
            raise ValueError("precision: expected auto, bf16 or fp32 with shard_towers, found fp16")
        if self.shard_towers and self.optim.name == "adafactor":
            raise ValueError("optim.name: expected adamw with shard_towers, found adafactor")
        for other in ("compile", "gradient_checkpointing", "shard_towers"):
            if self.cuda_graphs and getattr(self, other):
                raise ValueError(f"{other}: expected false with cuda_graphs, found true")
        if self.cuda_graphs and self.model.image.name:
            raise ValueError("cuda_graphs: expected false with a tower of pictures, found true")


def _check_least(config: object, where: str, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{where}{name}: expected at least {least}, found {value}")


def _positive(value: float) -> bool:
    return 0 < value < math.inf
