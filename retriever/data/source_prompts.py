"""Prompts of training sources: what a run trained with is what its model folder says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from index.files import InputError
from retriever.config.sources import SourceConfig
from retriever.data.batches import Prompts
from retriever.errors import ConfigError
from retriever.models.loading.text_settings import SIDES, Side
from retriever.models.towers import Towers

_FIELDS = {"query": "query_prompt", "document": "passage_prompt"}


def source_prompts(towers: Towers, sources: Sequence[SourceConfig]) -> list[Prompts]:
    """The prompts that each source is trained with: its own, or else the model's."""
    return [Prompts(_prompt(towers, source, "query"), _prompt(towers, source, "document")) for source in sources]


def save_source_prompts(towers: Towers, sources: Sequence[SourceConfig]) -> None:
    """Let the model's prompts be those that the sources train it with.

    Where all sources have the same prompt for a side, it becomes the model's own, which encoding and the dev set use.
    Where they differ, the model keeps its own, and those of the sources are saved beside it, by name.

    Raises:
        ConfigError: the model cannot honour a prompt.
    """
    for side in SIDES:
        for source in sources:
            try:
                towers.check_prompt(_prompt(towers, source, side), side)
            except InputError as error:
                raise ConfigError(f"data.sources: {source.path}: {_FIELDS[side]}: {error}") from error
        trained = {_prompt(towers, source, side) for source in sources}
        if len(trained) == 1:
            towers.model.prompts[side] = trained.pop()
        elif trained:
            towers.model.prompts.update(_named(towers, sources, side))


def describe_source_prompts(towers: Towers, sources: Sequence[SourceConfig]) -> list[str]:
    """A line for each side on which sources have prompts of their own, after `save_source_prompts`."""
    lines = []
    for side in SIDES:
        if all(getattr(source, _FIELDS[side]) is None for source in sources):
            continue
        own, names = towers.prompt(side), _named(towers, sources, side)
        if all(_prompt(towers, source, side) == own for source in sources):
            lines.append(f"{_FIELDS[side]}: the sources' {own!r} is saved as the model's own and used in evaluation")
        else:
            beside = f"; saved by name: {', '.join(names)}" if names else ""
            lines.append(
                f"{_FIELDS[side]}: sources differ; encoding and evaluation use the model's own, {own!r}{beside}"
            )
    return lines


def _prompt(towers: Towers, source: SourceConfig, side: Side) -> str:
    own = getattr(source, _FIELDS[side])
    return towers.prompt(side) if own is None else own


def _named(towers: Towers, sources: Sequence[SourceConfig], side: Side) -> dict[str, str]:
    """Name -> prompt of each that is not the model's own: the source's file, without its ending, and the side."""
    named: dict[str, str] = {}
    for source in sources:
        prompt = _prompt(towers, source, side)
        if not prompt or prompt == towers.prompt(side) or prompt in named.values():
            continue
        stem, number = Path(source.path.partition("@")[0]).name.split(".")[0], 1
        name = f"{stem}_{side}"
        while named.get(name, prompt) != prompt or towers.model.prompts.get(name, prompt) != prompt:
            number += 1
            name = f"{stem}_{side}_{number}"
        named[name] = prompt
    return named
