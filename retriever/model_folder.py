"""Model folders: loading them as text towers, beginning new ones, and refusing what cannot embed texts."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from index.files import InputError
from retriever.config import ConfigError, ModelConfig
from retriever.folder_checks import check_folder, own_class
from retriever.model_trial import Trial
from retriever.text_settings import UNLIMITED, Side, check_settings, limit_lengths
from retriever.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

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

def load_model(path: str, pooling: str | None = None, *, plain_texts: bool = True) -> SentenceTransformer:
    """A model folder or hub name, on the CPU and in fp32, with a `truncate_dim` turned into a module.

    Its embeddings of a few texts have been held to those of sentence-transformers.

    Args:
        path: a sentence-transformers folder, a Hugging Face encoder, or the hub name of either.
        pooling: of an encoder folder that says nothing of pooling; sentence-transformers' choice unless given.
        plain_texts: leave out a chat template, which is right before training alone; refuse one otherwise.

    Raises:
        InputError: there is no such model, it does not embed texts, or not as sentence-transformers does.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    folder = Path(path)
    if folder.is_dir():
        check_folder(folder)
    elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise InputError(f"{path}: no such model folder")
    without_bars()
    faults = load_faults()
    # fp32 whatever the file holds: training in bf16 weights loses small updates, and encoding chooses by autocast.
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    try:
        model = SentenceTransformer(path, device="cpu", model_kwargs=kwargs, trust_remote_code=False)
    except faults as error:
        if "trust_remote_code" in str(error):
            raise InputError(f"{path}: the model has code of its own, which is not run: {one_line(error)}") from error
        what = "cannot be loaded as a text model" if folder.is_dir() else "no such folder, and no such model on the hub"
        raise InputError(f"{path}: {what}: {one_line(error)}") from error
    if pooling and folder.is_dir() and not (folder / "modules.json").exists() and isinstance(model[-1], Pooling):
        model[-1] = Pooling(model[-1].embedding_dimension, pooling)
    towers = text_towers(model, path)
    for transformer in set(towers.values()):
        if plain_texts:
            read_plain_texts(transformer)
        elif "message" in transformer.modality_config:
            raise InputError(f"{path}: a model that reads its texts inside a chat template cannot encode here")
        _check_transformer(transformer, path)
    _check_modules(model, path)
    trial = Trial(model, towers, path, faults)
    for transformer in set(towers.values()):
        settle_tokenizer(transformer, path)
    _cut_by_module(model, path)
    trial.check(model)
    return model


def load_new_encoder(config: ModelConfig) -> SentenceTransformer:
    """A text tower from scratch, of `config.architecture`.

    Raises:
        ConfigError: there is no such architecture, or it cannot embed texts.
        InputError: the tokenizer cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_new_encoder(config, Path(folder))
        try:
            return load_model(folder, pooling=config.pooling)
        except InputError as error:
            raise ConfigError(f"model.architecture: {str(error).removeprefix(f'{folder}: ')}") from error


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


def load_faults() -> tuple[type[Exception], ...]:
    """What the loaders of transformers and a model's first pass raise where the model is at fault."""
    from huggingface_hub.errors import StrictDataclassError

    return (*LOAD_FAULTS, StrictDataclassError)


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
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=False)
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
    except load_faults() as error:
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


def settle_tokenizer(transformer: Any, path: str) -> None:
    """Give the tokenizer what embeddings that do not depend on their neighbours need; saved with the model."""
    _give_pad_token(transformer.tokenizer, path)
    # Absolute positions (GPT-2) count the padding on the left; with it on the right, every family agrees.
    transformer.tokenizer.padding_side = "right"
    limit, longest = position_limit(transformer), transformer.max_seq_length
    if limit is None:
        return
    if longest is None or longest > limit:
        transformer.max_seq_length = limit
    try:
        limit_lengths(transformer, limit)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _give_pad_token(tokenizer: Any, path: str) -> None:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise InputError(f"{path}: the tokenizer has no token to pad with: expected a pad, eos or unk token")


def _check_transformer(transformer: Any, path: str) -> None:
    """Refuse settings that cannot be honoured, code of the model's own, and tokens that the encoder does not have."""
    try:
        check_settings(transformer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    encoder, tokenizer = transformer.auto_model, transformer.tokenizer
    if code := own_class(encoder.config, type(encoder)):
        raise InputError(f"{path}: the model has code of its own, {code}, which is not run")
    _give_pad_token(tokenizer, path)
    try:
        embeddings = encoder.get_input_embeddings()
    except NotImplementedError:
        return
    if isinstance(embeddings, nn.Embedding):
        rows, tokens = embeddings.num_embeddings, {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        if (largest := max(tokens, default=0)) >= rows:
            raise InputError(
                f"{path}: expected token ids below {rows:,}, the size of the encoder's vocabulary, found {largest:,} "
                f"for {tokenizer.convert_ids_to_tokens(largest)}"
            )


def _check_modules(model: SentenceTransformer, path: str) -> None:
    """Refuse a folder whose modules.json hands arguments to modules that take none here."""
    for name, arguments in (model.module_kwargs or {}).items():
        if arguments:
            raise InputError(f"{path}: modules.json: kwargs {', '.join(arguments)} of module {name}: not supported")


def _cut_by_module(model: SentenceTransformer, path: str) -> None:
    """Say the folder's `truncate_dim` as a linear module that keeps the first dimensions.

    sentence-transformers cuts after the last module, so that what was of unit length is no more; as a module, the cut
    comes before a normalisation, and a run trains and saves it like any projection.
    """
    from sentence_transformers.sentence_transformer.modules import Dense

    kept, model.truncate_dim = model.truncate_dim, None
    if kept is None:
        return
    width = model.get_embedding_dimension()
    if width is None or not isinstance(kept, int) or isinstance(kept, bool) or kept < 1:
        raise InputError(f"{path}: truncate_dim: expected a number of dimensions of the embeddings, found {kept!r}")
    if kept < width:
        cut = torch.eye(kept, width)
        model.append(Dense(width, kept, bias=False, activation_function=nn.Identity(), init_weight=cut))


def without_bars() -> None:
    """Keep transformers from drawing progress bars, which would break up the one that the commands draw."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def one_line(error: Exception) -> str:
    """The message of an error of transformers, which likes many lines, as one of at most 300 letters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
