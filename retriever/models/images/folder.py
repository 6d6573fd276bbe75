"""Model folders with an image and a text tower: loading them, and joining two encoders to one.

The folder is sentence-transformers' own. Either its first module is a Router with the routes "text" and "image", or
one Transformer that has both methods, as a whole CLIP or SigLIP checkpoint has; `SentenceTransformer(path)` encodes
pictures and texts by it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from index.files import InputError
from retriever.config.images import ARCHITECTURES
from retriever.config.run import ModelConfig
from retriever.errors import ConfigError
from retriever.models.images.architectures import write_new_vision_encoder
from retriever.models.images.transforms import ImageTransform
from retriever.models.loading.folder import (
    LOAD_ERRORS,
    disable_progress_bars,
    ends_in_normalize,
    load_model,
    one_line,
    prepare_tokenizer,
)
from retriever.models.loading.from_scratch import load_new_encoder
from retriever.models.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_BOTH = {"text", "image"}


def config_folder(path_or_name: str) -> Path | None:
    """Where the configuration files of a model lie: its own folder, or for a hub name the one in the hub's cache.

    They are fetched without the weights where they are not there yet. None: there is no such folder or name.
    """
    from huggingface_hub import snapshot_download

    if Path(path_or_name).is_dir():
        return Path(path_or_name)
    disable_progress_bars()
    try:
        return Path(snapshot_download(path_or_name, allow_patterns=["*.json"]))
    except (OSError, ValueError):
        # ValueError: no name that the hub could have.
        return None


def is_image_text_model(path_or_name: str) -> bool:
    """Whether a folder or hub name holds towers of pictures and texts, by its configuration files alone."""
    folder = config_folder(path_or_name)
    return folder is not None and _has_both(folder)


def _has_both(folder: Path) -> bool:
    if (folder / "modules.json").exists():
        routers = [*folder.glob("router_config.json"), *folder.glob("*/router_config.json")]
        for router in routers:
            return set(_read(router).get("structure", {})) == _BOTH
        inner = [*folder.glob("sentence_bert_config.json"), *folder.glob("*/sentence_bert_config.json")]
        return any(set(_read(file).get("modality_config", {})) >= _BOTH for file in inner)
    settings = _read(folder / "config.json")
    return "vision_config" in settings and "text_config" in settings


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_image_text_model(path: str) -> SentenceTransformer:
    """A folder or hub name with both towers, on the CPU in fp32, whose embeddings have unit length.

    Raises:
        InputError: there is no such model, or it does not embed pictures and texts.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    _check_exists(path)
    settings = config_folder(path)
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    with _loading(path, "as a model of pictures and texts"):
        if settings is None or (settings / "modules.json").exists():
            model = SentenceTransformer(path, device="cpu", model_kwargs=kwargs, trust_remote_code=False)
        else:
            model = SentenceTransformer(modules=[_transformer(path), Normalize()], device="cpu")
    text, image = routes(model, path)
    for transformer in {text[0], image[0]}:
        _settle(transformer, path)
    if not (ends_with_normalize(text) and ends_with_normalize(image)):
        model.append(Normalize())
    return model


def join_encoders(config: ModelConfig) -> SentenceTransformer:
    """One model of the vision encoder `config.image` and the text encoder that the rest of `config` names.

    Both go to `config.projection` dimensions by a linear map each; without one, the image tower's own width is the
    common space, and the text tower is mapped to it.

    Raises:
        ConfigError: the configuration cannot be met.
        InputError: an encoder cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router
    from sentence_transformers.sentence_transformer.modules import Normalize

    loaded = load_new_encoder(config) if config.architecture else load_model(config.name, pooling=config.pooling)
    text: list[Any] = list(loaded)
    if hasattr(text[0], "sub_modules"):
        raise ConfigError(f"{config.name}: expected one text tower, found a model with two")
    text = text[:-1] if ends_in_normalize(text) else text
    image = load_vision_modules(config)
    width = int(image[-1].get_embedding_dimension())
    for modules in (text, image):
        own = SentenceTransformer(modules=modules, device="cpu").get_embedding_dimension() or 0
        if config.projection or own != width:
            modules.append(Dense(own, config.projection or width, bias=False, activation_function=nn.Identity()))
        modules.append(Normalize())
    return SentenceTransformer(
        modules=[Router({"text": text, "image": image}, default_route="text")],
        device="cpu",
        prompts={name: prompt or "" for name, prompt in loaded.prompts.items()},
        similarity_fn_name="cosine",
    )


def load_vision_modules(config: ModelConfig) -> list[Any]:
    """The modules of a vision encoder that make one vector of a picture: a Transformer, and its pooling if it has none.

    Raises:
        ConfigError: `config.image` cannot be met.
        InputError: the encoder cannot be loaded or reads no pictures.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    name = config.image.name
    if config.image.is_new:
        with tempfile.TemporaryDirectory() as folder, _loading(name, "as a vision encoder"):
            write_new_vision_encoder(name, config.image.size, Path(folder))
            return [_vision_transformer(folder)]
    _check_exists(name)
    settings = config_folder(name)
    if settings is not None and config.image.size is not None:
        raise ConfigError("model.image.size: expected none for a trained encoder, whose size is its own")
    with _loading(name, f"as a vision encoder (new ones are {', '.join(ARCHITECTURES)})"):
        if settings is not None and _has_both(settings) and not (settings / "modules.json").exists():
            with tempfile.TemporaryDirectory() as folder:
                _write_vision_half(name, folder)
                transformer = _vision_transformer(folder)
        else:
            transformer = _vision_transformer(name)
    _settle(transformer, name)
    if transformer.module_output_name == "token_embeddings":
        # ViT and DINOv2 end in a norm over all tokens, and their class token is the vector.
        return [transformer, Pooling(transformer.get_embedding_dimension(), "cls")]
    return [transformer]


def routes(model: SentenceTransformer, path: str = "model") -> tuple[list[Any], list[Any]]:
    """All modules that a text passes through, and all that a picture does; each begins with a Transformer.

    Raises:
        InputError: the model does not embed both.
    """
    from sentence_transformers.base.modules import Router, Transformer

    first: Any = model[0]
    rest = list(model)[1:]
    if isinstance(first, Router) and set(first.sub_modules) == _BOTH:
        sub: Any = first.sub_modules
        text, image = [*sub["text"], *rest], [*sub["image"], *rest]
    else:
        text = image = [first, *rest]
    for modality, modules in (("text", text), ("image", image)):
        if not isinstance(modules[0], Transformer) or modality not in modules[0].modality_config:
            raise InputError(
                f"{path}: expected a model of pictures and texts, found one that embeds no {modality}s "
                f"({type(modules[0]).__name__})"
            )
    return text, image


def ends_with_normalize(modules: list[Any]) -> bool:
    """Whether vectors leave these modules with unit length."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    return isinstance(modules[-1], Normalize)


def image_processor(transformer: Any) -> Any:
    """The image processor of a Transformer, alone or inside the one for both."""
    return getattr(transformer.processor, "image_processor", transformer.processor)


def _transformer(path: str, **settings: Any) -> Any:
    from sentence_transformers.base.modules import Transformer

    # None, the default, has transformers ask on the terminal whether it may run code of the folder's own.
    untrusted = {"trust_remote_code": False}
    return Transformer(
        path,
        model_kwargs={"dtype": torch.float32, **untrusted},
        processor_kwargs=dict(untrusted),
        config_kwargs=dict(untrusted),
        **settings,
    )


def _vision_transformer(path: str) -> Any:
    from transformers import AutoConfig

    settings: dict[str, Any] = {}
    if AutoConfig.from_pretrained(path, trust_remote_code=False).model_type.endswith("_vision_model"):
        # CLIP's and SigLIP's own pooling: a norm over the class token, a head that attends to all tokens.
        image = {"method": "forward", "method_output_name": "pooler_output"}
        settings = {"modality_config": {"image": image}, "module_output_name": "sentence_embedding"}
    transformer = _transformer(path, **settings)
    if "image" not in transformer.modality_config:
        raise InputError(f"{path}: expected a vision encoder, found {type(transformer.auto_model).__name__}")
    if settings:
        # What sentence-transformers takes for the length of a pooled vector.
        transformer.auto_model.config.projection_dim = transformer.auto_model.config.hidden_size
    return transformer


def _write_vision_half(path: str, folder: str) -> None:
    """The vision encoder of a whole checkpoint, with its image processor, as a folder of its own."""
    from transformers import AutoImageProcessor, AutoModel

    whole = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    save_encoder(whole.vision_model, Path(folder))
    with writing_weights(Path(folder)):
        AutoImageProcessor.from_pretrained(path, trust_remote_code=False).save_pretrained(folder)


def _settle(transformer: Any, path: str) -> None:
    """Give a loaded Transformer what embeddings that do not depend on their neighbours need; saved with the model."""
    encoder = transformer.auto_model
    if "image" in transformer.modality_config:
        # What cannot be said is refused here, where the model has a name.
        ImageTransform.of_processor(image_processor(transformer), path)
        if getattr(encoder.config, "model_type", "") == "vit":
            # Its pooler is not used here, and would be drawn anew where a folder lacks it.
            encoder.pooler = None
    if transformer.tokenizer is not None:
        prepare_tokenizer(transformer, path)
        text_settings = getattr(encoder.config, "text_config", None)
        longest = getattr(text_settings, "max_position_embeddings", None)
        if isinstance(longest, int) and (transformer.max_seq_length or longest + 1) > longest:
            transformer.max_seq_length = longest
        if reads_fixed_length(transformer):
            text = {"padding": "max_length", "max_length": transformer.max_seq_length, "return_attention_mask": False}
            transformer.processing_kwargs = {**transformer.processing_kwargs, "text": text}


def reads_fixed_length(transformer: Any) -> bool:
    """Whether texts must be padded to the longest length, and the padding read like text.

    So SigLIP was trained; its texts mean nothing otherwise. Fixed-size SigLIP 2 has the same model type.
    """
    return transformer.auto_model.config.model_type == "siglip"


def _check_exists(path: str) -> None:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "modules.json").exists() and not (folder / "config.json").exists():
            raise InputError(f"{folder}: expected a model folder with modules.json or config.json, found neither")
    elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise InputError(f"{path}: no such model folder")


@contextlib.contextmanager
def _loading(path: str, what: str) -> Iterator[None]:
    """Say what loading raises in one line, and keep transformers' bars and its table of missing poolers away."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    disable_progress_bars()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except InputError:
        raise
    except (*LOAD_ERRORS, StrictDataclassError) as error:
        where = "cannot be loaded" if Path(path).is_dir() else "no such folder, and cannot be loaded from the hub"
        raise InputError(f"{path}: {where} {what}: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
