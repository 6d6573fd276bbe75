"""The passage side of a model: its fingerprint, freezing it, and the record that it equals that of another model.

A run with `query_only` trains the query tower alone. Its model embeds passages as the model that the run started from,
bit for bit, so embeddings and indexes of that model remain valid. The model folder records this in a file, and the
fingerprint of its passages is then that of the first model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from index.files import InputError, read_json, write_json
from retriever.errors import ConfigError
from retriever.models.fingerprint import add_weights, without_provenance
from retriever.models.loading.text_settings import Side, has_router
from retriever.models.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PASSAGE_FILE = "passage_model.json"
"""File in a model folder: "model", the fingerprint of the model that embedded the passages, and "passage_sha256"."""


class PassageTowers(Protocol):
    """What is needed of `retriever.models.towers.Towers`, which imports this module."""

    model: SentenceTransformer

    def prompt(self, side: Side) -> str: ...

    def tokenizer(self, side: Side) -> TextTokenizer: ...


def passage_modules(towers: PassageTowers) -> list[Any]:
    """The sentence-transformers modules that a passage passes through, in order."""
    modules: list[Any] = list(towers.model)
    if not has_router(towers.model):
        return modules
    return [*modules[0].sub_modules["document"], *modules[1:]]


def passage_sha256(towers: PassageTowers) -> str:
    """A sha256 over everything that the embeddings of passages depend on; the same for one tower or two."""
    digest = hashlib.sha256()
    for number, module in enumerate(passage_modules(towers)):
        add_weights(digest, module.state_dict(), f"{number} ")
        if hasattr(module, "auto_model"):
            settings = without_provenance(module.auto_model.config.to_dict())
            digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        else:
            digest.update(repr(module).encode())
    texts = towers.tokenizer("document")
    digest.update(f"{towers.prompt('document')!r} {texts.max_length} {texts.settings()}\n".encode())
    return digest.hexdigest()


def freeze_passage_side(towers: PassageTowers) -> None:
    """Freeze all weights that the embeddings of passages depend on, so that only the query tower is trained.

    Raises:
        ConfigError: The query tower has no weights of its own.
    """
    frozen = {id(weight) for module in passage_modules(towers) for weight in module.parameters()}
    own = [weight for weight in towers.model.parameters() if id(weight) not in frozen and weight.requires_grad]
    if not own:
        raise ConfigError("query_only: expected a query tower with its own weights, found one that shares all of them")
    for module in passage_modules(towers):
        module.requires_grad_(False)


def write_passage_model(folder: Path, towers: PassageTowers, model: dict[str, str]) -> None:
    """Record in a model folder that its passages are embedded as by another model.

    Args:
        folder: The model folder.
        towers: The towers in it.
        model: Fingerprint of the other model.
    """
    write_json(folder / PASSAGE_FILE, {"model": model, "passage_sha256": passage_sha256(towers)})


def read_passage_model(folder: Path, towers: PassageTowers) -> dict[str, str] | None:
    """The fingerprint of the model whose passages are embedded alike; None if the folder records none.

    Raises:
        InputError: The file is invalid, or the passage side has been changed since it was written.
    """
    path = folder / PASSAGE_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    model = record.get("model") if isinstance(record, dict) else None
    if not isinstance(model, dict) or not all(isinstance(value, str) for value in model.values()):
        raise InputError(f"{path}: expected the fingerprint of a model, found {model!r:.60}")
    if record.get("passage_sha256") != (found := passage_sha256(towers)):
        raise InputError(
            f"{path}: expected a passage tower of sha256 {str(record.get('passage_sha256'))[:12]}…, found "
            f"{found[:12]}…: the model was changed since; remove the file if that was on purpose"
        )
    return model
