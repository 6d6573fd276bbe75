"""The settings of the loss for the batches of each source."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from losses import InfCLLoss, SigmoidLoss
from retriever.config.images import ImageSource
from retriever.config.loss import LossConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig


@dataclass(frozen=True)
class SourceObjective:
    """How the loss of the batches of one source is computed."""

    name: str
    """Short name of the source, for metrics; empty if it is the only one."""
    loss: LossConfig
    """The settings of the loss, with those of the source."""

    @classmethod
    def of_all(cls, config: TrainConfig) -> list[SourceObjective]:
        """Return those of all sources of a run.

        Raises:
            ValueError: A setting of a source is out of range.
        """
        sources = config.data.listed
        if len(sources) < 2:
            return [cls("", source_loss(config.loss, source)) for source in sources] or [cls("", config.loss)]
        return [
            cls(name, source_loss(config.loss, source))
            for name, source in zip(_short_names(sources), sources, strict=True)
        ]


class SourceLosses(nn.Module):
    """The losses of several sources, some of which have a logit_scale of their own.

    Args:
        default: The loss of all other sources.
        of_sources: Index of a source -> its own loss.
    """

    def __init__(self, default: InfCLLoss | SigmoidLoss, of_sources: dict[int, InfCLLoss | SigmoidLoss]) -> None:
        super().__init__()
        self.default = default
        self.of_sources = nn.ModuleDict({str(source): loss for source, loss in of_sources.items()})

    @property
    def logit_scale(self) -> Tensor:
        """0-dim: that of the sources without one of their own."""
        return self.default.logit_scale


def loss_of_source(loss: InfCLLoss | SigmoidLoss | SourceLosses, source: int) -> InfCLLoss | SigmoidLoss:
    """Return the loss of the batches of a source."""
    if not isinstance(loss, SourceLosses):
        return loss
    name = str(source)
    own = loss.of_sources[name] if name in set(loss.of_sources) else loss.default
    assert isinstance(own, InfCLLoss | SigmoidLoss)
    return own


def source_loss(loss: LossConfig, source: SourceConfig | ImageSource) -> LossConfig:
    """Return the settings of the loss with those of a source.

    Raises:
        ValueError: A setting of the source is out of range.
    """
    try:
        return dataclasses.replace(loss, **source.loss.given)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def _short_names(sources: tuple[SourceConfig | ImageSource, ...]) -> list[str]:
    """Return the names of files and folders without suffix, with a number if they repeat."""
    stems = [Path(source.path.partition("@")[0]).name.split(".")[0] or "source" for source in sources]
    return [stem if stems.count(stem) == 1 else f"{stem}_{number}" for number, stem in enumerate(stems)]
