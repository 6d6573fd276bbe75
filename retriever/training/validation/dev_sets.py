"""Opening the dev sets of a run: none, one, or several whose mean score chooses the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from index.progress import Reporter
from retriever.config.dev import DevConfig, split_of_path
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.errors import ConfigError
from retriever.training.validation.dev_set import DevSet, TextDevSet
from retriever.utils import own_packages


def open_dev_set(dev: DevConfig, *, images: bool, batch_size: int = 256) -> DevSet | None:
    """Open the dev set or sets of a configuration, or return None if there are none.

    Args:
        dev: the dev sets.
        images: whether the model embeds images and texts.
        batch_size: number of queries in a batch of the dev loss. Default: 256.

    Raises:
        ConfigError: two sets have the same name.
        InputError: a set does not exist, or a row is invalid.
    """
    paths = dev.paths or ((dev.path,) if dev.path else ())
    if not paths:
        return None
    own_packages.require("eval")
    if not dev.paths:
        return _open(dev, images, batch_size)
    sets: dict[str, DevSet] = {}
    for path in paths:
        folder, split = split_of_path(path)
        name = Path(folder).resolve().name + (f":{split}" if split else "")
        if name in sets:
            raise ConfigError(f"dev.paths: expected sets with different names, found {name} twice")
        one = dataclasses.replace(dev, path=folder, paths=(), split=split or dev.split)
        sets[name] = _open(one, images, batch_size)
    return DevSets(sets)


def _open(dev: DevConfig, images: bool, batch_size: int) -> DevSet:
    if not images:
        return TextDevSet.open(dev, batch_size)
    from retriever.training.validation.image_dev_set import ImageDevSet

    return ImageDevSet.open(dev)


@dataclass(frozen=True)
class DevSets:
    """Several dev sets as one, whose measures are the means over the sets."""

    sets: Mapping[str, DevSet]
    """Name -> set."""

    @property
    def metric(self) -> str:
        """Name of the measure that the best model is chosen by: that of all sets, or "score" if they differ."""
        metrics = {dev_set.metric for dev_set in self.sets.values()}
        return metrics.pop() if len(metrics) == 1 else "score"

    @property
    def fingerprint(self) -> str:
        """Hashes of all sets."""
        return " ".join(f"{name} {dev_set.fingerprint}" for name, dev_set in self.sets.items())

    def measures(
        self,
        towers: Any,
        embeddings: Path,
        options: EncodeOptions,
        reporter: Reporter,
        *,
        loss: nn.Module,
        tick: Callable[[], None] | None,
        ranks: Ranks,
    ) -> dict[str, float]:
        """Evaluate on each set.

        Returns:
            The means of the measures that all sets have, and "NAME_MEASURE" -> value of each set.
        """
        found = {}
        for number, (name, dev_set) in enumerate(self.sets.items()):
            folder = embeddings.with_name(f"{embeddings.name}-{number}")
            found[name] = dev_set.measures(towers, folder, options, reporter, loss=loss, tick=tick, ranks=ranks)
        if not all(found.values()):
            return {}
        common = set.intersection(*(set(measures) for measures in found.values()))
        # Confidence intervals have no mean.
        common = {name for name in common if not name.endswith(("_low", "_high"))}
        means = {m: float(np.mean([found[name][m] for name in found])) for m in found[next(iter(found))] if m in common}
        scores = [found[name][dev_set.metric.lower()] for name, dev_set in self.sets.items()]
        of_sets = {f"{name}_{measure}": value for name in found for measure, value in found[name].items()}
        return {**means, self.metric.lower(): float(np.mean(scores)), **of_sets}
