"""Weights that are missing in a model's files. transformers initializes them at random, with only a warning."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# A row of transformers' report: "encoder.layer.{0, 1}.output.dense.weight | MISSING | ".
_ROW = re.compile(r"^\s*(\S.*?)\s*\|[^|]*\bMISSING\b", re.MULTILINE)
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_GROUP = re.compile(r"\{([^{}]*)\}")


class _Reports(logging.Handler):
    """Log handler that collects the names of missing weights from transformers' reports."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        for name in _ROW.findall(_COLORS.sub("", record.getMessage())):
            self.names.update(_expand(name))


@contextlib.contextmanager
def collect_missing_weights() -> Iterator[set[str]]:
    """Context that yields a set and fills it with the names of missing weights as transformers reports them.

    The reports are not printed, because most concern weights that embeddings do not need. They are read even if logging
    is disabled.
    """
    logger, reports = logging.getLogger("transformers.modeling_utils"), _Reports()
    level, propagate, disabled = logger.level, logger.propagate, logging.root.manager.disable
    logger.addHandler(reports)
    logging.disable(logging.NOTSET)
    # Set only if necessary: an explicit level here makes transformers log more elsewhere.
    if not logger.isEnabledFor(logging.WARNING):
        logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield reports.names
    finally:
        logger.propagate = propagate
        logger.setLevel(level)
        logging.disable(disabled)
        logger.removeHandler(reports)


def used_missing_weights(encoder: nn.Module, names: set[str], embed: Callable[[], Tensor]) -> list[str]:
    """Return the missing weight matrices if embeddings depend on one of them; otherwise an empty list.

    Embeddings do not depend on the weights of an unused pooler, for example.

    Args:
        encoder: The encoder; weights of other modules are ignored.
        names: Names of missing weights.
        embed: Computes embeddings with the encoder.
    """
    missing = {
        name: weight
        for name, weight in encoder.named_parameters()
        # Vectors are biases and scales, which are initialized to constants.
        if name in names and weight.ndim > 1
    }
    if not missing:
        return []
    values = {name: weight.detach().clone() for name, weight in missing.items()}
    with torch.no_grad():
        try:
            for weight in missing.values():
                weight.fill_(torch.nan)
            used = not bool(embed().isfinite().all())
        finally:
            for name, weight in missing.items():
                weight.copy_(values[name])
    return sorted(missing) if used else []


def _expand(name: str) -> Iterator[str]:
    """Expand a name of a report: layer.{0, 1}.weight to layer.0.weight and layer.1.weight."""
    parts = _GROUP.split(name)
    choices = [part.split(", ") if number % 2 else [part] for number, part in enumerate(parts)]
    for choice in itertools.product(*choices):
        yield "".join(choice)
