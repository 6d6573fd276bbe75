"""Loading sentence-transformers and Hugging Face models as text towers, with checks of what is supported."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from index.files import InputError
from retriever.models.loading.checks import check_folder, check_hub_name, own_class
from retriever.models.loading.errors import disable_progress_bars, load_errors, one_line
from retriever.models.loading.hub import hub_problem, local_model
from retriever.models.loading.missing_weights import collect_missing_weights, used_missing_weights
from retriever.models.loading.reference_check import ReferenceCheck, sample_embeddings
from retriever.models.loading.text_settings import Side, check_lengths, check_settings, limit_lengths, text_tokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_model(path: str, pooling: str | None = None, *, plain_texts: bool = True) -> SentenceTransformer:
    """Load a model from a folder or the hub, on the CPU in fp32.

    A `truncate_dim` of the model becomes a module. The embeddings of a few texts are compared with those of
    sentence-transformers.

    Args:
        path: A sentence-transformers folder, a Hugging Face encoder folder, or the hub name of either, which may end in
            @revision.
        pooling: Pooling mode for an encoder folder without a pooling module. Default: sentence-transformers' default.
        plain_texts: For training: whether to remove a chat template. If False, a model with one is refused. Default:
            True.

    Raises:
        InputError: If there is no such model, it does not embed texts, or its embeddings differ from those of
            sentence-transformers.
    """
    try:
        return _load_model(path, pooling, plain_texts=plain_texts)
    except InputError:
        raise
    except load_errors() as error:
        # Settings of a damaged folder that loading itself does not use.
        raise InputError(f"{path}: cannot be used as a text model: {one_line(error)}") from error


def _load_model(path: str, pooling: str | None, *, plain_texts: bool) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    check_hub_name(path)
    location = local_model(path)
    if (folder := Path(location)).is_dir():
        check_folder(folder)
    disable_progress_bars()
    # Always fp32: training bf16 weights loses small updates, and encoding has its own precision setting.
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    try:
        with collect_missing_weights() as missing:
            model = SentenceTransformer(location, device="cpu", model_kwargs=kwargs, trust_remote_code=False)
    except load_errors() as error:
        if "trust_remote_code" in str(error):
            raise InputError(f"{path}: the model has custom code, which is not run") from error
        found = folder.is_dir()
        problem = f"cannot be loaded as a text model: {one_line(error)}" if found else hub_problem(error)
        raise InputError(f"{path}: {problem}") from error
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
    reference = ReferenceCheck(model, towers, path, for_training=plain_texts)
    for transformer in set(towers.values()):
        prepare_tokenizer(transformer, path)
    _truncate_by_module(model, path)
    reference.check(model)
    for side, transformer in towers.items():
        embed = partial(sample_embeddings, model, transformer, side, path)
        if needed := used_missing_weights(transformer.auto_model, missing, embed):
            kind = type(transformer.auto_model).__name__
            raise InputError(
                f"{path}: its files lack {len(needed)} weights of the {kind} that its configuration describes "
                f"({needed[0]}, …)"
            )
    return model


def text_towers(model: SentenceTransformer, path: str = "model") -> dict[Side, Any]:
    """Return the Transformer module of each side; the same object on both sides for a shared tower.

    Raises:
        InputError: If the first module is not a Transformer for texts, or a Router has other routes than query and
            document.
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
        takes_ids = text is not None and (
            text["method"] != "forward" or tower.auto_model.main_input_name == "input_ids"
        )
        if tower.tokenizer is None or not takes_ids:
            raise InputError(f"{path}: expected a transformer of texts, found {type(tower.auto_model).__name__}")
    return towers


def read_plain_texts(transformer: Any) -> None:
    """Disable the chat template into which sentence-transformers would insert the texts of a transformer."""
    if "text" in transformer.modality_config:
        transformer.modality_config.pop("message", None)


def position_limit(transformer: Any) -> int | None:
    """Return the number of tokens for which a transformer has positions; None if it is not limited."""
    config = transformer.auto_model.config
    # An image–text model has the configuration of its text encoder in `text_config`.
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - first_position(transformer.auto_model)


def transformer_layers(encoder: nn.Module) -> nn.ModuleList:
    """Return the transformer layers of a Hugging Face model: its longest ModuleList."""
    return max((module for module in encoder.modules() if isinstance(module, nn.ModuleList)), key=len)


def layer_depths(encoder: nn.Module) -> dict[nn.Parameter, int]:
    """Return parameter -> number of transformer layers after it, in the order of `named_parameters`.

    A parameter of the last layer, or one after the layers, has depth 0; one before the layers, such as an embedding,
    has the number of layers. A module without layers has depth 0.
    """
    if not any(isinstance(module, nn.ModuleList) for module in encoder.modules()):
        return dict.fromkeys(encoder.parameters(), 0)
    layers = transformer_layers(encoder)
    inside = {p: len(layers) - 1 - i for i, layer in enumerate(layers) for p in layer.parameters()}
    depths, depth_outside = {}, len(layers)
    # Hugging Face models register their modules in the order in which they run.
    for parameter in encoder.parameters():
        depth_outside = 0 if parameter in inside else depth_outside
        depths[parameter] = inside.get(parameter, depth_outside)
    return depths


def first_position(encoder: nn.Module) -> int:
    """Return the position id of the first token of a text: padding_idx + 1 for RoBERTa-like models, otherwise 0."""
    for module in encoder.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0


def ends_in_normalize(modules: Sequence[Any]) -> bool:
    """Whether these sentence-transformers modules end in a Normalize, on both sides."""
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import Normalize

    last = modules[-1]
    if isinstance(last, Router):
        routes: Any = last.sub_modules
        return all(isinstance(routes[side][-1], Normalize) for side in ("query", "document"))
    return isinstance(last, Normalize)


def prepare_tokenizer(transformer: Any, path: str) -> None:
    """Set pad token, padding side and lengths so that embeddings do not depend on the other texts of a batch.

    The settings are saved with the model.

    Raises:
        InputError: If there is no token to pad with, or the maximum length leaves no tokens for texts.
    """
    _set_pad_token(transformer.tokenizer, path)
    # With padding on the left, absolute positions (GPT-2) would include the padding.
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


def _set_pad_token(tokenizer: Any, path: str) -> None:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise InputError(f"{path}: the tokenizer has no token to pad with: expected a pad, eos or unk token")


def _check_transformer(transformer: Any, path: str) -> None:
    """Refuse unsupported settings, models with their own code, and token ids beyond the encoder's vocabulary."""
    try:
        check_settings(transformer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    encoder, tokenizer = transformer.auto_model, transformer.tokenizer
    if code := own_class(getattr(encoder.config, "auto_map", None), type(encoder)):
        raise InputError(f"{path}: the model has custom code, {code}, which is not run")
    _set_pad_token(tokenizer, path)
    try:
        embeddings = encoder.get_input_embeddings()
    except NotImplementedError:
        return
    if transformer.do_lower_case:
        # sentence-transformers reads this setting but does not save it by default.
        transformer.config_keys = [*type(transformer).config_keys, "do_lower_case"]
    if isinstance(embeddings, nn.Embedding):
        rows, tokens = embeddings.num_embeddings, {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        if (largest := max(tokens, default=0)) >= rows:
            raise InputError(
                f"{path}: expected token ids below {rows:,}, the size of the encoder's vocabulary, found {largest:,} "
                f"for {tokenizer.convert_ids_to_tokens(largest)}"
            )


def _check_model(model: SentenceTransformer, path: str) -> None:
    """Refuse unsupported or invalid settings of modules.json and `truncate_dim`."""
    for name, arguments in (model.module_kwargs or {}).items():
        if arguments:
            raise InputError(f"{path}: modules.json: kwargs {', '.join(arguments)} of module {name}: not supported")
    dim = model.truncate_dim
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
        raise InputError(f"{path}: truncate_dim: expected a number of dimensions above 0, found {dim!r}")


def _truncate_by_module(model: SentenceTransformer, path: str) -> None:
    """Replace `truncate_dim` by a linear module that keeps the first dimensions.

    sentence-transformers truncates after the last module, which undoes a normalization. As a module, the truncation can
    be followed by a normalization, and it is trained and saved like any projection.
    """
    from sentence_transformers.sentence_transformer.modules import Dense

    dim, model.truncate_dim = model.truncate_dim, None
    if dim is None:
        return
    if (width := model.get_embedding_dimension()) is None:
        raise InputError(f"{path}: truncate_dim: not supported for modules that do not state their dimension")
    if dim < width:
        identity = torch.eye(dim, width)
        model.append(Dense(width, dim, bias=False, activation_function=nn.Identity(), init_weight=identity))
