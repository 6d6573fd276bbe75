"""Model folders: loading them as text towers, beginning new ones, and refusing what cannot embed texts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from index.files import InputError
from retriever.config import ConfigError, ModelConfig
from retriever.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Side = Literal["query", "document"]

# Longer than any text: tokenizers without a limit of their own say 1e30.
UNLIMITED = 2**31

# The loaders of transformers raise all of these for folders that are incomplete or of another kind, and for
# configurations that no model can have.
LOAD_FAULTS = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    AttributeError,
    TypeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    SafetensorError,
)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_model(path: str, pooling: str | None = None) -> SentenceTransformer:
    """A model folder or hub name, on the CPU and in fp32, with a `truncate_dim` turned into a module.

    Args:
        path: a sentence-transformers folder, a Hugging Face encoder, or the hub name of either.
        pooling: of an encoder folder that says nothing of pooling; the mean unless given.

    Raises:
        InputError: there is no such model, or it does not embed texts.
    """
    from huggingface_hub.errors import StrictDataclassError
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = Path(path)
    if folder.is_dir():
        _check_folder(folder)
    elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise InputError(f"{path}: no such model folder")
    without_bars()
    # fp32 whatever the file holds: training in bf16 weights loses small updates, and encoding chooses by autocast.
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    try:
        if folder.is_dir() and not (folder / "modules.json").exists():
            transformer = Transformer(path, model_kwargs=kwargs)
            read_plain_texts(transformer)
            width = transformer.get_embedding_dimension()
            model = SentenceTransformer(modules=[transformer, Pooling(width, pooling or "mean")], device="cpu")
        else:
            model = SentenceTransformer(path, device="cpu", model_kwargs=kwargs)
    except (*LOAD_FAULTS, StrictDataclassError) as error:
        what = "cannot be loaded as a text model" if folder.is_dir() else "no such folder, and no such model on the hub"
        raise InputError(f"{path}: {what}: {one_line(error)}") from error
    for transformer in set(text_towers(model, path).values()):
        settle_tokenizer(transformer, path)
    _cut_by_module(model)
    return model


def text_towers(model: SentenceTransformer, path: str = "model") -> dict[Side, Any]:
    """The sentence-transformers Transformer that reads the texts of each side; one and the same for a shared tower.

    Raises:
        InputError: the model begins with something else, reads no texts, or routes in a way not known here.
    """
    from sentence_transformers.base.modules import Router, Transformer

    first: Any = model[0]
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        towers: dict[Side, Any] = {"query": first, "document": first}
    elif routers != [first] or first.route_mappings or not {"query", "document"} <= set(first.sub_modules):
        raise InputError(f"{path}: expected one Router, first, with the routes query and document")
    else:
        towers = {"query": first.sub_modules["query"][0], "document": first.sub_modules["document"][0]}
    for tower in towers.values():
        if not isinstance(tower, Transformer):
            kind = type(tower).__name__
            raise InputError(f"{path}: expected a model that begins with a transformer, found {kind}")
        text = tower.modality_config.get("text")
        by_ids = text is not None and (text["method"] != "forward" or tower.auto_model.main_input_name == "input_ids")
        if tower.tokenizer is None or not by_ids:
            raise InputError(f"{path}: expected a transformer of texts, found {type(tower.auto_model).__name__}")
    return towers


def read_plain_texts(transformer: Any) -> None:
    """Have a transformer read texts as they are, where sentence-transformers would lay its chat template about them."""
    if "text" in transformer.modality_config:
        transformer.modality_config.pop("message", None)


def position_limit(transformer: Any) -> int | None:
    """Most tokens that the transformer has positions for; none where its positions have no end."""
    positions = getattr(transformer.auto_model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - first_position(transformer.auto_model)


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """The transformer layers of a Hugging Face model."""
    return max((m for m in encoder.modules() if isinstance(m, nn.ModuleList)), key=len)


def first_position(encoder: nn.Module) -> int:
    """The position of a text's first token: RoBERTa and its kin count from the one after padding_idx."""
    for module in encoder.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0


def ends_in_normalize(modules: Sequence[Any]) -> bool:
    """Whether embeddings leave these sentence-transformers modules with unit length, on both sides."""
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import Normalize

    last = modules[-1]
    if isinstance(last, Router):
        routes: Any = last.sub_modules
        return all(isinstance(routes[side][-1], Normalize) for side in ("query", "document"))
    return isinstance(last, Normalize)


def write_new_encoder(config: ModelConfig, folder: Path) -> None:
    """Randomly initialised weights of `config.architecture`, with its tokenizer, as a Hugging Face folder.

    Raises:
        ConfigError: no tokenizer is named, or there is no such architecture.
        InputError: the tokenizer cannot be loaded.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer

    if not config.tokenizer:
        raise ConfigError("model.tokenizer: expected a path or hub name for a model from scratch")
    fields = dict(config.architecture or {})
    kind = fields.pop("model_type", None)
    kinds = list(CONFIG_MAPPING.keys())
    if kind not in kinds:
        near = ", ".join(difflib.get_close_matches(str(kind), kinds)) or "bert, roberta, modernbert"
        raise ConfigError(f"model.architecture: cannot be built: no model_type {kind!r}; near it: {near}")
    usual = AutoConfig.for_model(kind)
    _check_spelling(fields, usual)
    without_bars()
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    except LOAD_FAULTS as error:
        raise InputError(f"model.tokenizer: {config.tokenizer}: cannot be loaded: {one_line(error)}") from error
    # A tokenizer out of a model of pictures and texts would be loaded with an image processor, which is not here.
    tokenizer._processor_class = tokenizer.init_kwargs["processor_class"] = None
    # Some families lay a tokenizer of their own, with tokens of its own, over the one that stands beside them.
    with writing_weights(folder):
        usual.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        fields.setdefault("vocab_size", len(tokenizer))
        # An architecture's own defaults are the token ids of the vocabulary that it was published with.
        for name in ("pad", "bos", "eos", "cls", "sep"):
            fields.setdefault(f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        settings = AutoConfig.for_model(kind, **fields)
        if settings.vocab_size < len(tokenizer):
            raise ConfigError(f"vocab_size: expected at least the tokenizer's {len(tokenizer)}")
        model = AutoModel.from_config(settings)
    except (*LOAD_FAULTS, StrictDataclassError) as error:
        raise ConfigError(f"model.architecture: cannot be built: {one_line(error)}") from error
    save_encoder(model, folder)
    with writing_weights(folder):
        tokenizer.save_pretrained(folder)


def _check_spelling(fields: dict[str, Any], usual: Any) -> None:
    """transformers keeps whatever name it is given, and the field that was meant stays as it is by default.

    Names unlike any are let through: some are read for the sake of older configurations.
    """
    known = {*vars(usual), *usual.to_dict(), *usual.attribute_map}
    known = {name for name in known if not name.startswith("_")}
    for name in sorted(name for name in fields.keys() - known if not str(name).endswith("_token_id")):
        if near := difflib.get_close_matches(str(name), known, n=1, cutoff=0.88):
            raise ConfigError(f"model.architecture: {name}: unknown to {usual.model_type}; did you mean {near[0]}?")


def _check_folder(folder: Path) -> None:
    """transformers makes an empty tokenizer of a folder without one; such a model would embed nothing but [UNK]."""
    if not (folder / "modules.json").exists() and not (folder / "config.json").exists():
        raise InputError(f"{folder}: expected a model folder with modules.json or config.json, found neither")
    if not any(next(folder.rglob(name), None) for name in _TOKENIZER_FILES):
        raise InputError(f"{folder}: the model folder has no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")


def settle_tokenizer(transformer: Any, path: str) -> None:
    """Give the tokenizer what embeddings that do not depend on their neighbours need; saved with the model."""
    tokenizer = transformer.tokenizer
    # Absolute positions (GPT-2) count the padding on the left; with it on the right, every family agrees.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise InputError(f"{path}: the tokenizer has no token to pad with: expected a pad, eos or unk token")
    limit, longest = position_limit(transformer), transformer.max_seq_length
    if limit is not None and (longest is None or longest > limit):
        transformer.max_seq_length = limit


def _cut_by_module(model: SentenceTransformer) -> None:
    """Say the folder's `truncate_dim` as a linear module that keeps the first dimensions.

    sentence-transformers cuts after the last module, so that what was of unit length is no more; as a module, the cut
    comes before a normalisation, and a run trains and saves it like any projection.
    """
    from sentence_transformers.sentence_transformer.modules import Dense

    kept, model.truncate_dim = model.truncate_dim, None
    width = model.get_embedding_dimension()
    if kept is not None and width is not None and kept < width:
        cut = torch.eye(kept, width)
        model.append(Dense(width, kept, bias=False, activation_function=nn.Identity(), init_weight=cut))


def without_bars() -> None:
    """Keep transformers from drawing progress bars, which would break up the one that the commands draw."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def one_line(error: Exception) -> str:
    """The message of an error of transformers, which likes many lines, as one of at most 300 letters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
