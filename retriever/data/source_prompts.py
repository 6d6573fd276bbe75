"""Prompts of training sources, and how they are saved in the model."""

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
    """Return the prompts of each source: its own if set, otherwise those of the model."""
    return [Prompts(_prompt(towers, source, "query"), _prompt(towers, source, "document")) for source in sources]


def save_source_prompts(towers: Towers, sources: Sequence[SourceConfig]) -> None:
    """Store the prompts of the sources in the model, in place.

    If all sources have the same prompt for a side, it becomes the model's prompt, which encoding and the dev set use.
    Otherwise the model keeps its prompt, and the prompts of the sources are added under names derived from the sources.

    Raises:
        ConfigError: If a prompt takes up all tokens of a text, or the pooling excludes prompts.
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
    """Return a line for each side on which a source sets a prompt. Call after `save_source_prompts`."""
    lines = []
    for side in SIDES:
        if all(getattr(source, _FIELDS[side]) is None for source in sources):
            continue
        model_prompt, names = towers.prompt(side), _named(towers, sources, side)
        if all(_prompt(towers, source, side) == model_prompt for source in sources):
            lines.append(f"{_FIELDS[side]}: {model_prompt!r} is saved as the model's prompt and used in evaluation")
        else:
            saved = f"; saved by name: {', '.join(names)}" if names else ""
            lines.append(
                f"{_FIELDS[side]}: sources differ; encoding and evaluation use the model's own, {model_prompt!r}{saved}"
            )
    return lines


def _prompt(towers: Towers, source: SourceConfig, side: Side) -> str:
    prompt = getattr(source, _FIELDS[side])
    return towers.prompt(side) if prompt is None else prompt


def _named(towers: Towers, sources: Sequence[SourceConfig], side: Side) -> dict[str, str]:
    """Return name -> prompt of the prompts that differ from the model's. A name is the source's stem and the side."""
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
