"""Checks of a model folder before anything is loaded. Models with their own code are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from index.files import InputError, read_json

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_PACKAGE = "sentence_transformers."
# transformers builds each of them in a loop. The deepest published models have about 130 layers.
_COUNTS = re.compile(r"(n|num)_.*(layers?|labels|experts)|n_layers?|num_layers|depths?")
MAX_COUNT = 4096


def check_hub_name(path: str) -> None:
    """Raise InputError if `path` is neither a folder nor can be a hub name."""
    if Path(path).is_dir():
        return
    if Path(path).is_absolute() or path.startswith((".", "~")) or path.partition("@")[0].count("/") > 1:
        raise InputError(f"{path}: no such model folder")


def check_folder(folder: Path) -> None:
    """Check a model folder.

    Raises:
        InputError: If the folder has no model or no tokenizer, needs its own code, or has unknown settings.
    """
    if not any((folder / name).exists() for name in ("modules.json", "config.json", "adapter_config.json")):
        raise InputError(f"{folder}: expected a model folder with modules.json or config.json, found neither")
    check_counts(folder)
    _check_classes(folder / "config.json")
    _check_modules(folder / "modules.json")
    # Without these files transformers creates an empty tokenizer, for which every token is [UNK].
    has_tokenizer = any(next(folder.rglob(name), None) for name in _TOKENIZER_FILES)
    if not has_tokenizer and not any(_needs_no_vocabulary(file) for file in folder.rglob("tokenizer_config.json")):
        raise InputError(f"{folder}: the model folder has no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")


def check_counts(folder: Path) -> None:
    """Check the numbers of layers, labels and experts in the config.json of a model folder and of its modules.

    Raises:
        InputError: If one is so large that building the model would not end.
    """
    for file in [folder / "config.json", *folder.glob("*/config.json")]:
        settings = _read(file)
        if isinstance(settings, dict) and (name := too_many(settings)):
            raise InputError(f"{file}: {name}")


def too_many(settings: dict[Any, Any]) -> str:
    """Say which number of layers, labels or experts is above MAX_COUNT; empty if none is."""
    for name, value in settings.items():
        if isinstance(value, dict) and (found := too_many(value)):
            return f"{name}: {found}"
        if isinstance(value, int | float) and value > MAX_COUNT and _COUNTS.fullmatch(str(name)):
            return f"{name}: expected at most {MAX_COUNT:,}, found {value!r:.40}"
    return ""


def own_class(auto_map: dict[str, Any] | None, used: type | None) -> str | None:
    """Return the class in the folder's own code that `auto_map` names; None if there is none, or if `used` replaces it.

    Many models were published with code that is now part of transformers, under the same class name.
    """
    name = auto_map.get("AutoModel") if isinstance(auto_map, dict) else None
    return None if name is None or (used is not None and str(name).rsplit(".", 1)[-1] == used.__name__) else str(name)


def _check_modules(file: Path) -> None:
    """Check that the classes and settings of a modules.json or router_config.json are known."""
    for kind, folder in _modules(file):
        if not kind.startswith(_PACKAGE):
            raise InputError(f"{file}: the model has custom code, {kind}, which is not run")
        _check_keys(kind.rsplit(".", 1)[-1], folder / "config.json")
        _check_classes(folder / "config.json")
        if kind.rsplit(".", 1)[-1] in ("Router", "Asym"):
            _check_modules(folder / "router_config.json")


def _modules(file: Path) -> list[tuple[str, Path]]:
    """Return (class, folder) of each module in a modules.json or router_config.json."""
    content = _read(file)
    if isinstance(content, dict):
        types = content.get("types")
        return [(str(kind), file.parent / name) for name, kind in (types if isinstance(types, dict) else {}).items()]
    rows = [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []
    return [(str(row.get("type")), file.parent / str(row.get("path"))) for row in rows]


def _check_keys(kind: str, file: Path) -> None:
    """Check settings that sentence-transformers would ignore with a warning."""
    if kind not in ("Dense", "Normalize"):
        return
    from sentence_transformers.base.modules import dense, normalize

    known = (dense.Dense if kind == "Dense" else normalize.Normalize).config_keys
    settings = _read(file)
    if not isinstance(settings, dict):
        return
    for key in settings:
        if key not in known:
            raise InputError(f"{file}: expected {', '.join(known)}, found {key}")
    activation = settings.get("activation_function", "torch.")
    if not str(activation).startswith("torch."):
        raise InputError(f"{file}: activation_function: expected a module of torch, found {activation}")


def _check_classes(file: Path) -> None:
    """Check that a transformers configuration does not need the folder's own code."""
    from transformers import CONFIG_MAPPING

    settings = _read(file)
    if not isinstance(settings, dict) or not isinstance(settings.get("auto_map"), dict):
        return
    if settings.get("model_type") not in CONFIG_MAPPING:
        name = own_class(settings["auto_map"], None) or settings["auto_map"]
        raise InputError(f"{file}: the model has custom code, {name}, which is not run")


def _needs_no_vocabulary(file: Path) -> bool:
    """Whether a tokenizer_config.json names a tokenizer of bytes or characters, such as ByT5's or CANINE's."""
    import transformers

    settings = _read(file)
    kind = getattr(transformers, str(settings.get("tokenizer_class")), None) if isinstance(settings, dict) else None
    return kind is not None and not getattr(kind, "vocab_files_names", True)


def _read(file: Path) -> Any:
    """Return the JSON content of a file, or None if it cannot be read; loading the model reports that."""
    try:
        return read_json(file)
    except (OSError, InputError):
        return None
