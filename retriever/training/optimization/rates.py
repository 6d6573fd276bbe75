"""Learning rates by part of a model: encoder of queries or passages, layer, projection, logit scale."""

from __future__ import annotations

from torch import nn

from retriever.config.optim import OptimConfig
from retriever.errors import ConfigError
from retriever.models.loading.folder import layer_depths
from retriever.models.towers import Towers


def learning_rates(towers: Towers, loss: nn.Module, config: OptimConfig) -> dict[nn.Parameter, float]:
    """Return the peak learning rate of each parameter of towers and loss.

    With `layer_decay` d, the rate of layer i of the L layers of an encoder (0, …, L − 1, from the input) is multiplied
    by d^(L − 1 − i), and that of its embeddings by d^L (Clark et al., ELECTRA, arXiv 2003.10555).

    Raises:
        ConfigError: a rate of one side is given for a shared tower, or that of the logit scale for a constant one.
    """
    for name in ("query_lr", "passage_lr"):
        if getattr(config, name) is not None and len(towers.encoders_by_side) < 2:
            raise ConfigError(
                f"optim.{name}: expected none for a shared tower (model.shared), found {getattr(config, name)}"
            )
    if config.logit_scale_lr is not None and not any(p.requires_grad for p in loss.parameters()):
        raise ConfigError(
            f"optim.logit_scale_lr: expected none without loss.learn_logit_scale, found {config.logit_scale_lr}"
        )
    rates = {parameter: _or(config.projection_lr, config.lr) for parameter in towers.parameters()}
    of_side = {
        "both": config.lr,
        "query": _or(config.query_lr, config.lr),
        "passage": _or(config.passage_lr, config.lr),
    }
    for side, modules in towers.encoders_by_side.items():
        for module in modules:
            for parameter, depth in layer_depths(module).items():
                rates[parameter] = of_side[side] * config.layer_decay**depth
    rates.update(dict.fromkeys(loss.parameters(), _or(config.logit_scale_lr, config.lr)))
    return rates


def _or(rate: float | None, default: float) -> float:
    return default if rate is None else rate
