"""Prompts and maximum lengths by set, from a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import nn

from eval.sets.plan import Task
from index.files import InputError
from retriever.models.loading.folder import Side
from retriever.models.tokenizer import TextTokenizer
from retriever.models.towers import Towers

DEFAULT = "default"


@dataclass(frozen=True)
class SetSettings:
    """Prompts and maximum lengths for one set; None keeps the model's own."""

    query_prompt: str | None = None
    """Prompt, inserted before each query."""
    passage_prompt: str | None = None
    """Prompt, inserted before each passage."""
    query_max_length: int | None = None
    """Maximum length of a query in tokens, special tokens included."""
    passage_max_length: int | None = None
    """Maximum length of a passage in tokens, special tokens included."""


def read_settings(path: Path) -> dict[str, SetSettings]:
    """Read a YAML file that maps the name of a set, or "default" for all other sets, to the fields of SetSettings.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected YAML, found: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not all(isinstance(fields, dict) for fields in tree.values()):
        raise InputError(f"{path}: expected names of sets, or {DEFAULT}, each with its settings")
    return {str(name): _settings(fields, f"{path}: {name}") for name, fields in tree.items()}


def _settings(fields: dict[str, object], place: str) -> SetSettings:
    names = [field.name for field in dataclasses.fields(SetSettings)]
    for name, value in fields.items():
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, 1) or names
            raise InputError(f"{place}: expected {', '.join(names)}, found {name}; did you mean {nearest[0]}?")
        if name.endswith("_length"):
            expected, valid = "a number above 0", type(value) is int and value > 0
        else:
            expected, valid = "text", isinstance(value, str)
        if not valid:
            raise InputError(f"{place}: {name}: expected {expected}, found {value!r:.60}")
    return SetSettings(**fields)  # type: ignore[arg-type]


class AdjustedTowers(Towers):
    """A model with the prompts and lengths of a set; the weights are shared, the fingerprint differs.

    Raises:
        InputError: a length is above the model's maximum, or a prompt leaves no tokens for texts.
    """

    def __init__(self, towers: Towers, settings: SetSettings) -> None:
        # Towers.__init__ would check the modules again.
        nn.Module.__init__(self)
        self.model = towers.model
        self.padding_free = towers.padding_free
        self.truncate_dim = towers.truncate_dim
        self._frozen = towers._frozen
        # Prompts and lengths of a set change the passages.
        self.passage_model = None
        self._transformers = towers._transformers
        self._settings = settings
        self._base = towers
        for side in ("query", "document"):
            maximum, length = towers.tokenizer(side).max_length, self._max_length(side)
            if maximum is not None and length is not None and length > maximum:
                raise InputError(f"{side} length: expected at most {maximum}, the model's own maximum, found {length}")
            expansion = self.tokenizer(side).expansion
            if expansion is not None and length is not None and length < expansion.length:
                raise InputError(
                    f"{side} length: expected at least {expansion.length}, the length to which the model expands "
                    f"texts, found {length}"
                )
            self.check_prompt(self.prompt(side), side)
        self.eval()

    def prompt(self, side: Side) -> str:
        """The prompt of the set, otherwise that of the model."""
        prompt = self._settings.query_prompt if side == "query" else self._settings.passage_prompt
        return self._base.prompt(side) if prompt is None else prompt

    def tokenizer(self, side: Side) -> TextTokenizer:
        """The tokenizer of the model, which truncates at the length of the set."""
        tokenizer = self._base.tokenizer(side)
        return dataclasses.replace(tokenizer, max_length=self._max_length(side) or tokenizer.max_length)

    def _max_length(self, side: Side) -> int | None:
        return self._settings.query_max_length if side == "query" else self._settings.passage_max_length


def unused(settings: Mapping[str, SetSettings], tasks: Iterable[Task]) -> list[str]:
    """The names in the settings that match no set and may be misspelt."""
    names = {name for task in tasks for name in (task.name, task.row)}
    return [name for name in settings if name not in names and name != DEFAULT]


def towers_for(towers: Towers, settings: Mapping[str, SetSettings], *names: str) -> Towers:
    """The model with the settings of the first of `names` that has some, otherwise with the default settings."""
    own = next((settings[name] for name in (*names, DEFAULT) if name in settings), None)
    return towers if own is None else AdjustedTowers(towers, own)
