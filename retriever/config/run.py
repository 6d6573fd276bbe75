"""The configuration of a training run, as frozen dataclasses that check their values.

The docstrings of the fields are the help texts of `retriever train`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retriever.config.checks import MAX_STEPS, check_at_least, is_positive, shown
from retriever.config.data import DataConfig
from retriever.config.dev import DevConfig
from retriever.config.loss import LossConfig
from retriever.config.mining import MiningConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run. The defaults suit fine-tuning of a small encoder."""

    out: str = "runs/retriever"
    """Folder of the run, for config.yaml, metrics.jsonl, checkpoints/ and model/."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    dev: DevConfig = field(default_factory=DevConfig)
    batch_size: int = 256
    """Number of queries per optimizer step, over all processes. The passages of the other queries are negatives. If
    there are several sources, one with fewer rows gives smaller batches, each with all of its rows."""
    epochs: float = 1.0
    """Number of passes over the data. Ignored if steps is given."""
    steps: int | None = None
    """Number of optimizer steps. None: given by epochs."""
    mine_every: int | None = None
    """Steps between minings of the hard negatives of all rows with the current weights (ANCE, arXiv 2007.00808). The
    first one is before the first step if a source has no hard negatives. None: the hard negatives of the sources."""
    query_only: str = ""
    """Embedding store of a corpus: train the query tower alone, against all passages of the store. The loss is the
    exact softmax over the whole corpus. The passage tower is fixed, so embeddings and indexes of the corpus stay valid.
    The positives of data.sources are found in the store by their text or id. Needs model.shared false and the
    model.name that embedded the store. Empty: train both towers."""
    passages_on: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the embeddings of query_only are in training. device: in the memory of the device. host: in host memory,
    from where each step copies them in blocks. disk: read from the store in blocks. auto: the first with enough free
    memory."""
    seed: int = 0
    """Random seed of the data order, dropout and new weights, 0 to 2^64 - 1."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …, or mps (Apple GPUs, fp32). auto: cuda if available, otherwise cpu."""
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
    cuda_graphs: bool | None = None
    """Run micro-batches of up to 32,768 tokens as CUDA graphs: faster if batches are so small that the GPU waits for
    the host; only in bf16. None: used if all micro-batches of the first step are that small and the model and the
    settings allow it."""
    gradient_checkpointing: bool = False
    """Recompute activations of the towers in backward: less memory, about a third more time."""
    loss_spikes: Literal["ignore", "warn", "skip", "roll_back"] = "warn"
    """What to do about a step whose loss is far above the median of the steps before. ignore: nothing. warn: log a
    message; only logged steps are checked. skip: leave the step out. roll_back: leave it out and return to the weights
    of the newest checkpoint, without reading data again. skip and roll_back wait for the device after every step, and
    end the run after ten spikes in a row."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    track: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Trackers that receive the rows of metrics.jsonl, too. Their settings are their own environment variables, such as
    WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI and TRACKIO_DIR."""
    tensorboard: bool = False
    """The same as track: [tensorboard]."""
    plot: bool = True
    """Draw the metrics to metrics.png in the run folder when the run ends or stops, if matplotlib is installed."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers, each once."""
        return tuple(dict.fromkeys((*self.track, *(("tensorboard",) if self.tensorboard else ()))))

    def __post_init__(self) -> None:
        counts = ("batch_size", "micro_batch_tokens", "log_every", "checkpoint_every", "keep_checkpoints", "mine_every")
        check_at_least(self, "", 1, *counts)
        check_at_least(self, "", 1, "steps", maximum=MAX_STEPS)
        check_at_least(self, "", 0, "seed", maximum=2**128)
        if self.seed >= 2**64:
            raise ValueError(f"seed: expected a number below 2^64, found {shown(self.seed)}")
        if self.batch_size == 1 and not self.data.negatives and self.loss.name != "sigmoid":
            raise ValueError(
                "batch_size: expected at least 2, or data.negatives, found 1: a query needs passages other than its own"
            )
        if not is_positive(self.epochs):
            raise ValueError(f"epochs: expected a positive number, found {self.epochs}")
        if self.mine_every and not self.data.negatives:
            raise ValueError("data.negatives: expected at least 1 with mine_every, found 0")
        if self.data.clusters and self.shard_towers:
            raise ValueError("data.clusters: expected none with shard_towers")
        if self.mine_every and self.shard_towers:
            raise ValueError("mine_every: expected none with shard_towers")
        if self.mine_every and self.model.image.name:
            raise ValueError("mine_every: expected none with an image tower")
        if self.mine_every and any(source.passage_prompt_column for source in self.data.sources):
            raise ValueError("mine_every: expected no passage_prompt_column: a passage has one embedding")
        if self.shard_towers and self.precision == "fp16":
            raise ValueError("precision: expected auto, bf16 or fp32 with shard_towers, found fp16")
        if self.shard_towers and self.optim.name == "adafactor":
            raise ValueError("optim.name: expected adamw with shard_towers, found adafactor")
        if self.shard_towers and self.model.lora.rank and self.model.lora.base in ("bf16", "nf4"):
            raise ValueError(f"model.lora.base: expected auto or fp32 with shard_towers, found {self.model.lora.base}")
        if self.model.lora.rank and self.model.lora.base == "nf4" and self.precision == "fp16":
            raise ValueError("model.lora.base: expected auto or fp32 with precision fp16, found nf4")
        if self.model.lora.rank and self.model.lora.base == "nf4" and self.compile:
            raise ValueError("model.lora.base: expected auto, fp32 or bf16 with compile, found nf4")
        if self.model.lora.rank and self.model.lora.base == "bf16" and self.precision not in ("auto", "bf16"):
            raise ValueError(f"model.lora.base: expected auto or fp32 with precision {self.precision}, found bf16")
        for name in ("compile", "gradient_checkpointing", "shard_towers"):
            if self.cuda_graphs and getattr(self, name):
                raise ValueError(f"{name}: expected false with cuda_graphs, found true")
        if self.cuda_graphs and self.model.image.name:
            raise ValueError("cuda_graphs: expected false with an image tower, found true")
