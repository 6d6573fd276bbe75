"""Configuration of low-rank adaptation (LoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retriever.config.checks import check_at_least


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of the encoders (LoRA, arXiv 2106.09685), with the library peft."""

    rank: int = 0
    """Rank of the update of each matrix; the weights of the encoders are frozen. 0: no LoRA. The learning rate is
    usually about ten times that of training all weights."""
    alpha: float | None = None
    """The update is multiplied by alpha / rank. None: twice the rank."""
    dropout: float = 0.0
    """Dropout probability of the input of an update."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that are adapted, for example q_proj v_proj. Empty: all linear layers."""
    base: Literal["auto", "fp32", "bf16", "nf4"] = "auto"
    """Precision in which the frozen weights are stored. auto: bf16 if the towers compute in bf16 and are not sharded,
    otherwise fp32. nf4: the adapted matrices in 4.5 bits a weight (QLoRA, arXiv 2305.14314, with the library
    bitsandbytes), all other weights as with auto."""
    save: Literal["merged", "adapter"] = "merged"
    """What the model folder contains. merged: an ordinary model in fp32 with the updates added to its weights; with nf4
    to the dequantized weights, with which the updates were trained. adapter: only the updates; the folder or hub name
    of the base model is needed to load it, and after training with nf4 its weights are those before quantization, so
    that embeddings differ slightly from those of the run."""

    def __post_init__(self) -> None:
        check_at_least(self, "model.lora.", 0, "rank")
        if self.base == "nf4" and not self.rank:
            raise ValueError("model.lora.rank: expected at least 1 with model.lora.base nf4, found 0")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"model.lora.alpha: expected a positive number, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout: expected a number from 0 to below 1, found {self.dropout}")

    @property
    def scaling(self) -> float:
        """Factor of the updates."""
        return 2.0 if self.alpha is None else self.alpha / self.rank
