"""Reading open_clip's checkpoints of vision and text transformers in CLIP's form, as a folder of transformers.

The names of weights and settings are those of open_clip (https://github.com/mlfoundations/open_clip), model.py and
transformer.py.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from index.files import InputError, read_json
from retriever.models.images.transforms import CLIP_STATISTICS
from retriever.models.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from transformers import CLIPConfig

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

# Settings that are read, those without effect on embeddings, and the only value of the others that transformers' CLIP
# has. open_clip's defaults are these values.
_READ = {
    "model_cfg": ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
    "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"),
    "text_cfg": ("layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size"),
}
_NO_EFFECT = {
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "patch_dropout", "output_tokens", "pad_id"),
    *("eos_id", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "timm_model_pretrained", "timm_pool"),
    *("timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path", "hf_model_pretrained", "hf_proj_type"),
    *("hf_pooler_type", "attn_pooler_queries", "attn_pooler_heads"),
}
_ONLY = {"pos_embed_type": "learnable", "proj_type": "linear", "block_type": "default"}
_POOLING = {"vision_cfg": "tok", "text_cfg": "argmax"}

# Weights outside of the layers, and those of a layer: open_clip's name -> transformers'.
OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}
"""Weights outside of the layers; names without a suffix have a weight and a bias."""
STACKS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
ATTENTION = ("q_proj", "k_proj", "v_proj")
"""Parts of open_clip's attn.in_proj_weight and attn.in_proj_bias, in order."""
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
"""Projections, which are transposed."""


def is_open_clip(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in open_clip's form, and none in that of transformers."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


@contextlib.contextmanager
def transformers_folder(location: str) -> Iterator[str]:
    """Context with a folder of the model in transformers' form: the folder itself, or a temporary, converted copy.

    Raises:
        InputError: If it is an open_clip checkpoint that transformers' CLIP cannot express, or a damaged one.
    """
    if not is_open_clip(Path(location)):
        yield location
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(location), Path(folder))
        yield folder


def convert(folder: Path, out: Path) -> None:
    """Write an open_clip checkpoint as a CLIP model of transformers, with its processor.

    Args:
        folder: A folder with open_clip_config.json, open_clip_model.safetensors and the files of a tokenizer.
        out: An existing folder.

    Raises:
        InputError: If a file is missing or damaged, or a setting has no counterpart.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

    about = read_json(folder / CONFIG)
    model_cfg = about.get("model_cfg") if isinstance(about, dict) else None
    if not isinstance(model_cfg, dict):
        raise InputError(f"{folder / CONFIG}: expected an object with model_cfg, found none")
    config = clip_config(model_cfg, str(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder / WEIGHTS}: no such file; of open_clip's weights, safetensors are read")
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read: {error}") from None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"{folder}: expected the files of its tokenizer, tokenizer.json or vocab.json and merges.txt")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts: Any = config.text_config
    texts.bos_token_id, texts.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    model = CLIPModel(config)
    model.load_state_dict(_renamed(weights, model.state_dict(), str(folder / WEIGHTS)))
    image_size = model_cfg["vision_cfg"]["image_size"]
    images = _image_processor(about.get("preprocess_cfg") or {}, image_size, str(folder / CONFIG))
    save_encoder(model, out)
    with writing_weights(out):
        CLIPProcessor(images, tokenizer).save_pretrained(out)


def clip_config(model_cfg: Mapping[str, Any], place: str) -> CLIPConfig:
    """Return transformers' configuration of an open_clip model.

    Args:
        model_cfg: open_clip's configuration.
        place: Its file, for messages.

    Raises:
        InputError: If a setting is missing or has no counterpart.
    """
    from transformers import CLIPConfig

    vision, text = (model_cfg.get(name) for name in ("vision_cfg", "text_cfg"))
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise InputError(f"{place}: expected vision_cfg and text_cfg, found {', '.join(model_cfg)}")
    _check_settings("model_cfg", model_cfg, place)
    _check_settings("vision_cfg", vision, place)
    _check_settings("text_cfg", text, place)
    try:
        act = {"hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu", "layer_norm_eps": 1e-5}
        text_config = {
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            # With the id 2, transformers' CLIP takes the output at the largest token id, as open_clip does by default.
            "eos_token_id": text["eos_id"] if text.get("pool_type") == "eos" else 2,
        }
        vision_config = {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        }
        return CLIPConfig(
            text_config={**text_config, **act},
            vision_config={**vision_config, **act},
            projection_dim=model_cfg["embed_dim"],
        )
    except KeyError as error:
        raise InputError(f"{place}: expected the setting {error}, found none") from None


def _check_settings(section: str, settings: Mapping[str, Any], place: str) -> None:
    for name, value in settings.items():
        if name in _READ[section] or name in _NO_EFFECT or not value:
            # Of settings that are not read, open_clip's default is none, false or 0, but for those below.
            continue
        only = _POOLING.get(section) if name == "pool_type" else _ONLY.get(name)
        by_end = section == "text_cfg" and name == "pool_type" and value == "eos" and settings.get("eos_id", 2) != 2
        if value != only and not by_end:
            wanted = f"{only!r}" if only else "none"
            raise InputError(
                f"{place}: {section}.{name}: expected {wanted}, which transformers' CLIP has, found {value!r:.60}"
            )
    for name in ("image_size", "patch_size", "layers"):
        if section == "vision_cfg" and not isinstance(settings.get(name), int):
            raise InputError(f"{place}: {section}.{name}: expected a whole number, found {settings.get(name)!r}")


def _renamed(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The weights by transformers' names, after a check of their shapes."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        # open_clip's models with `custom_text` have the prefix.
        found.update(_renamed_weight(name.removeprefix("text."), tensor.float()))
    for name, tensor in expected.items():
        if name == "logit_scale":
            found.setdefault(name, tensor)
        elif name.endswith("position_ids"):
            found[name] = tensor
        elif name not in found or found[name].shape != tensor.shape:
            shape = list(found[name].shape) if name in found else "none"
            raise InputError(f"{place}: expected weights for {name} of shape {list(tensor.shape)}, found {shape}")
    if unknown := [name for name in found if name not in expected and name not in ("logit_bias", "attn_mask")]:
        raise InputError(f"{place}: expected the weights of a CLIP model, found {unknown[0]}")
    return {name: found[name].reshape(expected[name].shape) for name in expected}


def _renamed_weight(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name in PROJECTIONS:
        return {PROJECTIONS[name]: tensor.T}
    if name == "logit_scale":
        return {name: tensor.reshape(())}
    for stack, layers in STACKS.items():
        if name.startswith(f"{stack}."):
            number, _, rest = name.removeprefix(f"{stack}.").partition(".")
            if rest.startswith("attn.in_proj_"):
                end = rest.removeprefix("attn.in_proj_")
                parts = zip(ATTENTION, tensor.chunk(3), strict=True)
                return {f"{layers}.{number}.self_attn.{part}.{end}": own for part, own in parts}
            base, _, end = rest.rpartition(".")
            ours = "self_attn.out_proj" if base == "attn.out_proj" else LAYER.get(base, base)
            return {f"{layers}.{number}.{ours}.{end}": tensor}
    base, _, end = name.rpartition(".")
    ours = OUTER.get(name) or (f"{OUTER[base]}.{end}" if base in OUTER else name)
    return {ours: tensor}


def _image_processor(settings: Mapping[str, Any], side: int, place: str) -> Any:
    from PIL.Image import Resampling
    from transformers import CLIPImageProcessor

    mode, interpolation = settings.get("resize_mode") or "shortest", settings.get("interpolation") or "bicubic"
    filters = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}
    if mode not in ("shortest", "squash") or interpolation not in filters:
        raise InputError(
            f"{place}: preprocess_cfg: expected resize_mode shortest or squash and interpolation bicubic or bilinear, "
            f"found {mode!r} and {interpolation!r}"
        )
    exact = {"height": side, "width": side}
    return CLIPImageProcessor(
        size={"shortest_edge": side} if mode == "shortest" else exact,
        do_center_crop=mode == "shortest",
        crop_size=exact,
        resample=int(filters[interpolation]),
        image_mean=list(settings.get("mean") or CLIP_STATISTICS[0]),
        image_std=list(settings.get("std") or CLIP_STATISTICS[1]),
    )
