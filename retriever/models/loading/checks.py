"""What is refused of a model folder before anything of it is loaded, and the name of code that it would run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from index.files import InputError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_OURS = "sentence_transformers."


def check_folder(folder: Path) -> None:
    """Raises InputError for a folder without a model or a tokenizer, with code of its own, or with unknown settings."""
    if not any((folder / name).exists() for name in ("modules.json", "config.json", "adapter_config.json")):
        raise InputError(f"{folder}: expected a model folder with modules.json or config.json, found neither")
    _check_classes(folder / "config.json")
    _check_modules(folder / "modules.json")
    # transformers makes an empty tokenizer of a folder without one; such a model would embed nothing but [UNK].
    named = any(next(folder.rglob(name), None) for name in _TOKENIZER_FILES)
    if not named and not any(_needs_no_vocabulary(file) for file in folder.rglob("tokenizer_config.json")):
        raise InputError(f"{folder}: the model folder has no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")


def own_class(auto_map: dict[str, Any] | None, used: type | None) -> str | None:
    """The class that the `auto_map` of a configuration names, in code of the folder's own, if `used` is another."""
    name = (auto_map or {}).get("AutoModel")
    # Many models were published with code that transformers has taken up since, under the same name.
    return None if name is None or (used is not None and name.rsplit(".", 1)[-1] == used.__name__) else str(name)


def _check_modules(file: Path) -> None:
    """Of a modules.json, or the router_config.json of a module: that all classes and their settings are known."""
    for kind, place in _modules(file):
        if not kind.startswith(_OURS):
            raise InputError(f"{file}: the model has code of its own, {kind}, which is not run")
        _check_keys(kind.rsplit(".", 1)[-1], place / "config.json")
        _check_classes(place / "config.json")
        if kind.rsplit(".", 1)[-1] in ("Router", "Asym"):
            _check_modules(place / "router_config.json")


def _modules(file: Path) -> list[tuple[str, Path]]:
    """(class, folder) of each module that a modules.json or router_config.json names."""
    found = _read(file)
    if isinstance(found, dict):
        return [(str(kind), file.parent / name) for name, kind in (found.get("types") or {}).items()]
    rows = [row for row in found or () if isinstance(row, dict)]
    return [(str(row.get("type")), file.parent / str(row.get("path"))) for row in rows]


def _check_keys(kind: str, file: Path) -> None:
    """Of settings that sentence-transformers leaves out with a warning; others it refuses by itself."""
    if kind not in ("Dense", "Normalize"):
        return
    from sentence_transformers.base.modules import dense, normalize

    known = (dense.Dense if kind == "Dense" else normalize.Normalize).config_keys
    settings = _read(file) or {}
    for key in settings:
        if key not in known:
            raise InputError(f"{file}: expected {', '.join(known)}, found {key}")
    activation = settings.get("activation_function", "torch.")
    if not str(activation).startswith("torch."):
        raise InputError(f"{file}: activation_function: expected a module of torch, found {activation}")


def _check_classes(file: Path) -> None:
    """Of a configuration of transformers: that its model needs no code of the folder's own."""
    from transformers import CONFIG_MAPPING

    settings = _read(file)
    if not isinstance(settings, dict) or not isinstance(settings.get("auto_map"), dict):
        return
    if settings.get("model_type") not in CONFIG_MAPPING:
        name = own_class(settings["auto_map"], None) or settings["auto_map"]
        raise InputError(f"{file}: the model has code of its own, {name}, which is not run")


def _needs_no_vocabulary(file: Path) -> bool:
    """Whether a tokenizer_config.json names a tokenizer of bytes or characters (ByT5, CANINE)."""
    import transformers

    kind = getattr(transformers, str((_read(file) or {}).get("tokenizer_class")), None)
    return kind is not None and not getattr(kind, "vocab_files_names", True)


def _read(file: Path) -> Any:
    """The JSON in a file; None where there is none, which what loads it will say."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
