"""Configuration of the optimizer and the learning rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from retriever.config.checks import is_positive


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
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up. cosine, linear: falls to zero at the last step. constant: does not fall. wsd:
    warm-up, stable, decay (MiniCPM, arXiv 2404.06395): constant, then falls linearly to zero over the last
    decay_fraction of the steps."""
    decay_fraction: float = 0.2
    """Fraction of all steps, 0 to 1, in which the learning rate of the schedule wsd falls."""
    query_lr: float | None = None
    """Peak learning rate of the query encoder of a model with two towers, or of the text encoder of an image–text
    model. None: lr."""
    passage_lr: float | None = None
    """Peak learning rate of the passage encoder of a model with two towers, or of the image encoder of an image–text
    model. None: lr."""
    projection_lr: float | None = None
    """Peak learning rate of the modules after the encoders, such as a new projection. None: lr."""
    logit_scale_lr: float | None = None
    """Peak learning rate of a learned logit scale and bias. None: lr."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer of an encoder to the layer below it, above 0 and at most 1; the
    embeddings are below the first layer. 1: all layers have the same learning rate."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, 0 to below 1, for example 0.999. The averaged weights are
    evaluated on the dev sets and saved as the model. In step t = 1, 2, … the decay is at most (1 + t) / (10 + t). None:
    no average."""
    max_grad_norm: float | None = 1.0
    """Maximum L2 norm of the gradient of all parameters; larger gradients are scaled down. None: no clipping."""

    def __post_init__(self) -> None:
        eps, norm = self.eps, self.max_grad_norm
        checks = {
            "name": (self.name in ("adamw", "adafactor"), "adamw or adafactor"),
            "lr": (is_positive(self.lr), "a positive number"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "betas": (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers from 0 to below 1"),
            "eps": (eps is None or is_positive(eps), "a positive number"),
            "warmup_fraction": (0 <= self.warmup_fraction <= 1, "a fraction from 0 to 1"),
            "schedule": (self.schedule in ("cosine", "linear", "constant", "wsd"), "cosine, linear, constant or wsd"),
            "decay_fraction": (0 <= self.decay_fraction <= 1, "a fraction from 0 to 1"),
            "layer_decay": (0 < self.layer_decay <= 1, "a number over 0 and at most 1"),
            "ema": (self.ema is None or 0 <= self.ema < 1, "a number from 0 to below 1"),
            "max_grad_norm": (norm is None or is_positive(norm), "a positive number"),
        }
        for name in ("query_lr", "passage_lr", "projection_lr", "logit_scale_lr"):
            rate = getattr(self, name)
            checks[name] = (rate is None or is_positive(rate), "a positive number")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"optim.decay_fraction: expected at most {1 - self.warmup_fraction:g}, what warmup_fraction leaves, "
                f"found {self.decay_fraction}"
            )
        for name, (valid, expected) in checks.items():
            if not valid:
                raise ValueError(f"optim.{name}: expected {expected}, found {getattr(self, name)}")
