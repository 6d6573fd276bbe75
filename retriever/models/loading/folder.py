"""Model folders: loading them as text towers, and refusing what cannot embed texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from index.files import InputError
from retriever.models.loading.checks import check_folder, own_class
from retriever.models.loading.missing_weights import collect_missing_weights, used_missing_weights
from retriever.models.loading.text_settings import Side, check_lengths, check_settings, limit_lengths, text_tokenizer
from retriever.models.loading.trial import Trial, sample_embeddings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# The loaders of transformers raise all of these for folders that are incomplete or of another kind, and for
# configurations that no model can have.
LOAD_ERRORS = (
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
    disable_progress_bars()
    faults = load_errors()
    # fp32 whatever the file holds: training in bf16 weights loses small updates, and encoding chooses by autocast.
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    try:
        with collect_missing_weights() as missing:
            model = SentenceTransformer(path, device="cpu", model_kwargs=kwargs, trust_remote_code=False)
    except faults as error:
        if "trust_remote_code" in str(error):
            raise InputError(f"{path}: the model has code of its own, which is not run") from error
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
    _check_model(model, path)
    trial = Trial(model, towers, path, faults, to_train=plain_texts)
    for transformer in set(towers.values()):
        prepare_tokenizer(transformer, path)
    _cut_by_module(model, path)
    trial.check(model)
    for side, transformer in towers.items():
        made_up = used_missing_weights(
            transformer.auto_model,
            missing,
            partial(sample_embeddings, model, transformer, side, path, faults),
        )
        if made_up:
            kind = type(transformer.auto_model).__name__
            raise InputError(
                f"{path}: its files lack {len(made_up)} weights of the {kind} that its configuration describes "
                f"({made_up[0]}, …)"
            )
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


def load_errors() -> tuple[type[Exception], ...]:
    """What the loaders of transformers and a model's first pass raise where the model is at fault."""
    from huggingface_hub.errors import StrictDataclassError

    return (*LOAD_ERRORS, StrictDataclassError)


def position_limit(transformer: Any) -> int | None:
    """Most tokens that the transformer has positions for; none where its positions have no end."""
    config = transformer.auto_model.config
    # Of a model of pictures and texts, the text encoder's.
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - first_position(transformer.auto_model)


def transformer_layers(encoder: nn.Module) -> nn.ModuleList:
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


def prepare_tokenizer(transformer: Any, path: str) -> None:
    """Give the tokenizer what embeddings that do not depend on their neighbours need; saved with the model."""
    _give_pad_token(transformer.tokenizer, path)
    # Absolute positions (GPT-2) count the padding on the left; with it on the right, every family agrees.
    transformer.tokenizer.padding_side = "right"
    limit, longest = position_limit(transformer), transformer.max_seq_length
    special = text_tokenizer(transformer, "document").special_count
    if limit is not None and limit <= special:
        raise InputError(f"{path}: expected more than {special} positions, the number of special tokens, found {limit}")
    if limit is not None and (longest is None or longest > limit):
        transformer.max_seq_length = limit
    try:
        if limit is not None:
            limit_lengths(transformer, limit)
        check_lengths(transformer)
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
    if code := own_class(getattr(encoder.config, "auto_map", None), type(encoder)):
        raise InputError(f"{path}: the model has code of its own, {code}, which is not run")
    _give_pad_token(tokenizer, path)
    try:
        embeddings = encoder.get_input_embeddings()
    except NotImplementedError:
        return
    if transformer.do_lower_case:
        # sentence-transformers reads this setting, but would not save it.
        transformer.config_keys = [*type(transformer).config_keys, "do_lower_case"]
    if isinstance(embeddings, nn.Embedding):
        rows, tokens = embeddings.num_embeddings, {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        if (largest := max(tokens, default=0)) >= rows:
            raise InputError(
                f"{path}: expected token ids below {rows:,}, the size of the encoder's vocabulary, found {largest:,} "
                f"for {tokenizer.convert_ids_to_tokens(largest)}"
            )


def _check_model(model: SentenceTransformer, path: str) -> None:
    """Refuse what a folder says of all its modules and what cannot be meant or is not supported."""
    for name, arguments in (model.module_kwargs or {}).items():
        if arguments:
            raise InputError(f"{path}: modules.json: kwargs {', '.join(arguments)} of module {name}: not supported")
    kept = model.truncate_dim
    if kept is not None and (not isinstance(kept, int) or isinstance(kept, bool) or kept < 1):
        raise InputError(f"{path}: truncate_dim: expected a number of dimensions above 0, found {kept!r}")


def _cut_by_module(model: SentenceTransformer, path: str) -> None:
    """Say the folder's `truncate_dim` as a linear module that keeps the first dimensions.

    sentence-transformers cuts after the last module, so that what was of unit length is no more; as a module, the cut
    comes before a normalisation, and a run trains and saves it like any projection.
    """
    from sentence_transformers.sentence_transformer.modules import Dense

    kept, model.truncate_dim = model.truncate_dim, None
    if kept is None:
        return
    if (width := model.get_embedding_dimension()) is None:
        raise InputError(f"{path}: truncate_dim: not supported for modules that do not say their dimension")
    if kept < width:
        cut = torch.eye(kept, width)
        model.append(Dense(width, kept, bias=False, activation_function=nn.Identity(), init_weight=cut))


def disable_progress_bars() -> None:
    """Keep transformers from drawing progress bars, which would break up the one that the commands draw."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def one_line(error: Exception) -> str:
    """The message of an error of transformers, which likes many lines, as one of at most 300 letters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
