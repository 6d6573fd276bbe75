"""What a model is told differently from set to set: prompts and maximum lengths, from a YAML file."""

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
    """Prompts and lengths for one set; none leaves the model's own."""

    query_prompt: str | None = None
    """Text put before each query."""
    passage_prompt: str | None = None
    """Text put before each passage."""
    query_max_length: int | None = None
    """Tokens read of a query, special ones included."""
    passage_max_length: int | None = None
    """Tokens read of a passage."""


def read_settings(path: Path) -> dict[str, SetSettings]:
    """Read a YAML file: a set's name, or "default" for all others, -> the fields of SetSettings.

    Raises:
        InputError: the file is missing or broken, a key is unknown, or a value is of the wrong type.
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
            near = difflib.get_close_matches(str(name), names, 1)
            raise InputError(f"{place}: expected {', '.join(names)}, found {name}; did you mean {(near or names)[0]}?")
        number = name.endswith("_length")
        right = (
            isinstance(value, int) and not isinstance(value, bool) and value > 0 if number else isinstance(value, str)
        )
        if not right:
            wanted = "a number above 0" if number else "text"
            raise InputError(f"{place}: {name}: expected {wanted}, found {value!r:.60}")
    return SetSettings(**fields)  # type: ignore[arg-type]


class AdjustedTowers(Towers):
    """The same weights with other prompts and lengths; their vectors have a fingerprint of their own.

    Raises:
        InputError: a length is above the model's own, or a prompt leaves none for texts.
    """

    def __init__(self, towers: Towers, settings: SetSettings) -> None:
        # Not Towers' own: the modules are shared, and have been checked.
        nn.Module.__init__(self)
        self.model = towers.model
        self.padding_free = towers.padding_free
        self._transformers = towers._transformers
        self._settings = settings
        self._given = towers
        for side in ("query", "document"):
            own, wanted = towers.tokenizer(side).max_length, self._max_length(side)
            if own is not None and wanted is not None and wanted > own:
                raise InputError(f"{side} length: expected at most {own}, the model's own maximum, found {wanted}")
            expansion = self.tokenizer(side).expansion
            if expansion is not None and wanted is not None and wanted < expansion.length:
                raise InputError(
                    f"{side} length: expected at least {expansion.length}, to which the model fills up texts, "
                    f"found {wanted}"
                )
            self.check_prompt(self.prompt(side), side)
        self.eval()

    def prompt(self, side: Side) -> str:
        """The set's prompt, or the model's."""
        own = self._settings.query_prompt if side == "query" else self._settings.passage_prompt
        return self._given.prompt(side) if own is None else own

    def tokenizer(self, side: Side) -> TextTokenizer:
        """The model's tokenizer, cutting at the set's length."""
        texts = self._given.tokenizer(side)
        return dataclasses.replace(texts, max_length=self._max_length(side) or texts.max_length)

    def _max_length(self, side: Side) -> int | None:
        return self._settings.query_max_length if side == "query" else self._settings.passage_max_length


def unused(settings: Mapping[str, SetSettings], tasks: Iterable[Task]) -> list[str]:
    """Names in the settings that no set here has: one of them may be misspelt."""
    names = {name for task in tasks for name in (task.name, task.row)}
    return [name for name in settings if name not in names and name != DEFAULT]


def towers_for(towers: Towers, settings: Mapping[str, SetSettings], *names: str) -> Towers:
    """The model as the first of `names` that has settings wants it, else the default's, else as it is."""
    found = next((settings[name] for name in (*names, DEFAULT) if name in settings), None)
    return towers if found is None else AdjustedTowers(towers, found)
