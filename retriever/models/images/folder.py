"""Loading image–text models, and combining an image encoder and a text encoder into one model.

The models are sentence-transformers models. The first module is either a Router with the routes "text" and "image", or
a Transformer with both modalities (a CLIP or SigLIP checkpoint). `SentenceTransformer(path)` encodes images and texts.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from index.files import InputError, read_json
from retriever.config.images import ARCHITECTURES
from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.models.images.architectures import write_new_vision_encoder
from retriever.models.images.open_clip import CONFIG, WEIGHTS, is_open_clip, transformers_folder
from retriever.models.images.transforms import ImageTransform
from retriever.models.loading.checks import check_counts, check_hub_name
from retriever.models.loading.errors import disable_progress_bars, is_load_error, one_line
from retriever.models.loading.folder import ends_in_normalize, load_model, prepare_tokenizer
from retriever.models.loading.from_scratch import load_new_encoder
from retriever.models.loading.hub import hub_problem, local_model, split_revision
from retriever.models.loading.text_settings import has_router
from retriever.models.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_MODALITIES = {"text", "image"}
# A convolutional network has no patches. This number of pixels per side counts as a token when micro-batches are
# formed and memory is planned.
CONVOLUTION_PATCH = 8


def config_folder(path_or_name: str) -> Path | None:
    """Return the folder with the JSON files of a model: the model folder, or the snapshot in the hub's cache.

    For a hub name they are downloaded, without the weights, unless they are cached. None: there is no such model.
    """
    from huggingface_hub import snapshot_download

    if Path(path_or_name).is_dir():
        return Path(path_or_name)
    disable_progress_bars()
    name, revision = split_revision(path_or_name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json"]))
    except (OSError, ValueError):
        # ValueError: not a valid hub name.
        return None


def is_image_text_model(path_or_name: str) -> bool:
    """Whether a model folder or hub name has an image tower and a text tower, judged by its configuration files."""
    folder = config_folder(path_or_name)
    return folder is not None and _has_both_modalities(folder)


def _has_both_modalities(folder: Path) -> bool:
    if (folder / "modules.json").exists():
        routers = [*folder.glob("router_config.json"), *folder.glob("*/router_config.json")]
        if routers:
            return _keys(_read_json(routers[0]).get("structure")) == _MODALITIES
        files = [*folder.glob("sentence_bert_config.json"), *folder.glob("*/sentence_bert_config.json")]
        return any(_keys(_read_json(file).get("modality_config")) >= _MODALITIES for file in files)
    if is_open_clip(folder):
        return True
    settings = _read_json(folder / "config.json")
    return "vision_config" in settings and "text_config" in settings


def _keys(value: Any) -> set[str]:
    return set(value) if isinstance(value, dict) else set()


def _read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is none. Loading the model reports damaged files."""
    try:
        content = read_json(file)
    except (OSError, InputError):
        return {}
    return content if isinstance(content, dict) else {}


def load_image_text_model(path: str) -> SentenceTransformer:
    """Load an image–text model from a folder or the hub, on the CPU in fp32.

    Its embeddings have unit length; a Normalize module is added if necessary.

    Raises:
        InputError: If there is no such model, or it does not embed images and texts.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    _check_exists(path)
    settings, location = config_folder(path), local_model(path)
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    with _load_errors_as_input_errors(path, "as an image–text model"):
        if settings is None or (settings / "modules.json").exists():
            model = SentenceTransformer(location, device="cpu", model_kwargs=kwargs, trust_remote_code=False)
        else:
            with transformers_folder(_with_weights(location, settings)) as folder:
                model = SentenceTransformer(modules=[_transformer(folder), Normalize()], device="cpu")
        text, image = modality_routes(model, path)
        for transformer in {text[0], image[0]}:
            _prepare_transformer(transformer, path)
    if not (ends_in_normalize(text) and ends_in_normalize(image)):
        model.append(Normalize())
    return model


def join_encoders(config: ModelConfig) -> SentenceTransformer:
    """Combine the vision encoder of `config.image` and the text encoder of `config` into one model.

    Each encoder is followed by a linear projection to `config.projection` dimensions. If that is None, the dimension is
    that of the vision encoder, and only the text encoder gets a projection, if its dimension differs; with
    `into_text_space` it is that of the text encoder, and only the vision encoder gets one.

    Raises:
        ConfigError: If the encoders do not allow the configuration.
        InputError: If an encoder cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router
    from sentence_transformers.sentence_transformer.modules import Normalize

    loaded = load_new_encoder(config) if config.architecture else load_model(config.name, pooling=config.pooling)
    text: list[Any] = list(loaded)
    if has_router(loaded):
        raise ConfigError(f"{config.name}: expected one text tower, found a model with two")
    text = text[:-1] if ends_in_normalize(text) else text
    image = load_vision_modules(config)
    dims = [
        SentenceTransformer(modules=modules, device="cpu").get_embedding_dimension() or 0 for modules in (text, image)
    ]
    common = config.projection or dims[0 if config.image.into_text_space else 1]
    for modules, dim in zip((text, image), dims, strict=True):
        if config.projection or dim != common:
            modules.append(Dense(dim, common, bias=False, activation_function=nn.Identity()))
        modules.append(Normalize())
    return SentenceTransformer(
        modules=[Router({"text": text, "image": image}, default_route="text")],
        device="cpu",
        prompts={name: prompt or "" for name, prompt in loaded.prompts.items()},
        similarity_fn_name="cosine",
    )


def load_vision_modules(config: ModelConfig) -> list[Any]:
    """Return the modules of a vision encoder: a Transformer, and a Pooling unless the encoder pools by itself.

    Raises:
        ConfigError: If `config.image.size` does not fit the encoder.
        InputError: If the encoder cannot be loaded or does not embed images.
    """
    name = config.image.name
    if config.image.is_new:
        with tempfile.TemporaryDirectory() as folder, _load_errors_as_input_errors(name, "as a vision encoder"):
            write_new_vision_encoder(name, config.image.size, Path(folder))
            return _with_pooling(_vision_transformer(folder))
    _check_exists(name)
    settings, location = config_folder(name), local_model(name)
    if settings is not None and config.image.size is not None:
        raise ConfigError("model.image.size: expected none for a trained encoder, whose size is its own")
    with _load_errors_as_input_errors(name, f"as a vision encoder (new ones are {', '.join(ARCHITECTURES)})"):
        if settings is not None and _has_both_modalities(settings) and not (settings / "modules.json").exists():
            with (
                transformers_folder(_with_weights(location, settings)) as whole,
                tempfile.TemporaryDirectory() as folder,
            ):
                _write_vision_encoder(whole, folder)
                transformer = _vision_transformer(folder)
        else:
            transformer = _vision_transformer(location)
        _prepare_transformer(transformer, name)
    return _with_pooling(transformer)


def _with_pooling(transformer: Any) -> list[Any]:
    from sentence_transformers.sentence_transformer.modules import Pooling

    if transformer.module_output_name != "token_embeddings":
        return [transformer]
    return [transformer, Pooling(transformer.get_embedding_dimension(), _pooling(transformer))]


def _pooling(transformer: Any) -> Literal["cls", "mean"]:
    """How the outputs of an encoder without a pooled output become one: the class token if it has one, or their mean.

    ViT and DINOv2 have a class token. Convolutional networks and hierarchical transformers (Swin) have none.
    """
    config, size = transformer.auto_model.config, ImageTransform.of_processor(image_processor(transformer)).size
    if not hasattr(config, "patch_size"):
        return "mean"
    with torch.inference_mode():
        tokens = transformer({"pixel_values": torch.zeros(1, 3, *size), "modality": "image"})["token_embeddings"].shape[
            1
        ]
    return "cls" if tokens > image_patches(config, size) else "mean"


def image_patches(config: Any, size: tuple[int, int]) -> int:
    """The number of patches of an image; of an encoder without patches, the number of squares of 8 × 8 pixels."""
    patch = getattr(getattr(config, "vision_config", config), "patch_size", CONVOLUTION_PATCH)
    sides = (patch, patch) if isinstance(patch, int) else patch
    return math.prod(max(1, pixels // side) for pixels, side in zip(size, sides, strict=True))


def modality_routes(model: SentenceTransformer, path: str = "model") -> tuple[list[Any], list[Any]]:
    """Return the modules for texts and the modules for images, in order; each list begins with a Transformer.

    Raises:
        InputError: If the model does not embed both.
    """
    from sentence_transformers.base.modules import Router, Transformer

    first: Any = model[0]
    rest = list(model)[1:]
    if isinstance(first, Router) and set(first.sub_modules) == _MODALITIES:
        branches: Any = first.sub_modules
        text, image = [*branches["text"], *rest], [*branches["image"], *rest]
    else:
        text = image = [first, *rest]
    for modality, modules in (("text", text), ("image", image)):
        if not isinstance(modules[0], Transformer) or modality not in modules[0].modality_config:
            raise InputError(
                f"{path}: expected an image–text model, found one that does not embed {modality}s "
                f"({type(modules[0]).__name__})"
            )
    return text, image


def image_processor(transformer: Any) -> Any:
    """Return the image processor of a Transformer module, which may be part of a processor for both modalities."""
    return getattr(transformer.processor, "image_processor", transformer.processor)


def _with_weights(location: str, settings: Path) -> str:
    """The folder of an open_clip checkpoint, after its weights have been downloaded; other models are unchanged."""
    if Path(location).is_dir() or not is_open_clip(settings):
        return location
    from huggingface_hub import snapshot_download

    return snapshot_download(location, allow_patterns=["*.json", "*.txt", WEIGHTS])


def _transformer(path: str, **settings: Any) -> Any:
    from sentence_transformers.base.modules import Transformer

    # With the default, None, transformers asks on the terminal whether to run the folder's own code.
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
        # CLIP pools by a LayerNorm of the class token, SigLIP by an attention head.
        image = {"method": "forward", "method_output_name": "pooler_output"}
        settings = {"modality_config": {"image": image}, "module_output_name": "sentence_embedding"}
    transformer = _transformer(path, **settings)
    if "image" not in transformer.modality_config:
        raise InputError(f"{path}: expected a vision encoder, found {type(transformer.auto_model).__name__}")
    if settings:
        # sentence-transformers reads the dimension of a pooled output from this field.
        transformer.auto_model.config.projection_dim = transformer.auto_model.config.hidden_size
    return transformer


def _write_vision_encoder(path: str, folder: str) -> None:
    """Write the vision encoder and the image processor of an image–text checkpoint to a folder."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    save_encoder(model.vision_model, Path(folder))
    with writing_weights(Path(folder)):
        AutoImageProcessor.from_pretrained(path, trust_remote_code=False).save_pretrained(folder)


def _prepare_transformer(transformer: Any, path: str) -> None:
    """Check the image processor and set the tokenizer's lengths and padding; the settings are saved with the model."""
    encoder = transformer.auto_model
    if "image" in transformer.modality_config:
        # Called for its errors, whose messages name the model.
        ImageTransform.of_processor(image_processor(transformer), path)
        if getattr(encoder.config, "model_type", "") == "vit":
            # The pooler is not used. It would be initialized at random if the folder lacks its weights.
            encoder.pooler = None
    if transformer.tokenizer is not None:
        prepare_tokenizer(transformer, path)
        text_settings = getattr(encoder.config, "text_config", None)
        longest = getattr(text_settings, "max_position_embeddings", None)
        if isinstance(longest, int) and (transformer.max_seq_length or longest + 1) > longest:
            transformer.max_seq_length = longest
        if needs_fixed_length(transformer):
            text = {"padding": "max_length", "max_length": transformer.max_seq_length, "return_attention_mask": False}
            transformer.processing_kwargs = {**transformer.processing_kwargs, "text": text}


def needs_fixed_length(transformer: Any) -> bool:
    """Whether texts must be padded to the maximum length without an attention mask, as SigLIP was trained.

    Fixed-size SigLIP 2 has the same model type.
    """
    return transformer.auto_model.config.model_type == "siglip"


def _check_exists(path: str) -> None:
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("modules.json", "config.json", CONFIG)):
            raise InputError(f"{folder}: expected a model folder with modules.json or config.json, found neither")
    else:
        check_hub_name(path)
        folder = config_folder(path) or folder
    check_counts(folder)


@contextlib.contextmanager
def _load_errors_as_input_errors(path: str, what: str) -> Iterator[None]:
    """Context that turns errors of loading into one-line InputErrors, and disables transformers' warnings."""
    from transformers.utils import logging

    disable_progress_bars()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_load_error(error):
            raise
        found = Path(path).is_dir() or config_folder(path) is not None
        problem = f"cannot be loaded {what}: {one_line(error)}" if found else f"{hub_problem(error)} ({what})"
        raise InputError(f"{path}: {problem}") from error
    finally:
        logging.set_verbosity(verbosity)
