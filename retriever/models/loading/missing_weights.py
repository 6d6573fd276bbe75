"""Weights that a model's files lack: transformers makes them up at random and only warns."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# Rows of transformers' report: "encoder.layer.{0, 1}.output.dense.weight | MISSING | ".
_ROW = re.compile(r"^\s*(\S.*?)\s*\|[^|]*\bMISSING\b", re.MULTILINE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_GROUP = re.compile(r"\{([^{}]*)\}")


class _Reports(logging.Handler):
    """Collects the names of weights that the reports of transformers call missing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        for name in _ROW.findall(_COLOURS.sub("", record.getMessage())):
            self.names.update(_expanded(name))


@contextlib.contextmanager
def collect_missing_weights() -> Iterator[set[str]]:
    """The names of the weights that transformers says it made up within, filled in as it loads.

    Its reports are not printed: most are about weights that embeddings do not need. They are read even where the
    program has silenced warnings.
    """
    logger, reports = logging.getLogger("transformers.modeling_utils"), _Reports()
    level, propagate, disabled = logger.level, logger.propagate, logging.root.manager.disable
    logger.addHandler(reports)
    logging.disable(logging.NOTSET)
    # Not where it is needless: transformers says more in other loggers where this one has a level of its own.
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
    """Those of the named matrices, which were made up, that embeddings depend on: a pooler's, say, they do not.

    Args:
        encoder: may have some of the names.
        embed: makes embeddings.
    """
    made_up = {
        name: weight
        for name, weight in encoder.named_parameters()
        # A vector is a bias or a scale, which begins at its neutral value.
        if name in names and weight.ndim > 1
    }
    if not made_up:
        return []
    values = {name: weight.detach().clone() for name, weight in made_up.items()}
    with torch.no_grad():
        try:
            for weight in made_up.values():
                weight.fill_(torch.nan)
            used = not bool(embed().isfinite().all())
        finally:
            for name, weight in made_up.items():
                weight.copy_(values[name])
    return sorted(made_up) if used else []


def _expanded(name: str) -> Iterator[str]:
    """The names that one of a report stands for: layer.{0, 1}.weight for layer.0.weight and layer.1.weight."""
    parts = _GROUP.split(name)
    choices = [part.split(", ") if place % 2 else [part] for place, part in enumerate(parts)]
    for chosen in itertools.product(*choices):
        yield "".join(chosen)
