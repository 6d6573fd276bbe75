"""Writing image–text models in the forms of open_clip and of transformers' CLIP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from index.files import InputError, write_json
from retriever.models.images.folder import image_processor
from retriever.models.images.open_clip import ATTENTION, CONFIG, LAYER, OUTER, PROJECTIONS, STACKS, WEIGHTS
from retriever.models.images.towers import ImageTextTowers
from retriever.models.weights import save_encoder, save_tensors, writing_weights

Format = Literal["open_clip", "transformers"]

# Families of text encoders that open_clip's HFTextEncoder knows, and its names of poolings.
HF_FAMILIES = ("bert", "roberta", "xlm-roberta")
HF_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}


def export_towers(towers: ImageTextTowers, out: Path, form: Format, logit_scale: float) -> None:
    """Write the towers to an existing, empty folder.

    The image tower must be a CLIP vision transformer. The text tower must be that of a CLIP model, or for open_clip an
    encoder of HF_FAMILIES with mean or cls pooling. The projections of both must be linear, without a bias.

    Args:
        towers: The towers.
        out: The folder.
        form: "open_clip": open_clip_config.json, open_clip_model.safetensors and the tokenizer, for
            `open_clip.create_model_and_transforms("local-dir:OUT")`. "transformers": a CLIPModel with its processor.
        logit_scale: 1 / temperature, which is stored with the weights.

    Raises:
        InputError: The form cannot express the model; the message says why.
    """
    if any(prompt for prompt in towers.model.prompts.values()):
        raise InputError("expected a model without prompts, which CLIP's forms cannot express")
    if towers.truncate_dim is not None:
        raise InputError("expected a model with all its dimensions, found one that is truncated")
    text, image = towers.text_modules, towers.image_modules
    whole = text[0].auto_model if text[0] is image[0] else None
    if whole is not None and whole.config.model_type != "clip":
        raise InputError(f"expected a CLIP model, found {whole.config.model_type}")
    if whole is not None:
        _write(out, form, whole.state_dict(), whole.config.to_dict(), towers, logit_scale)
        return
    vision = image[0].auto_model
    if vision.config.model_type != "clip_vision_model":
        raise InputError(f"expected a CLIP vision transformer as the image tower, found {vision.config.model_type}")
    weights = _with_prefix("vision_model", vision)
    weights["visual_projection.weight"] = _projection(image[1:], vision.config.hidden_size)
    encoder = text[0].auto_model
    pooling = next((module for module in text if type(module).__name__ == "Pooling"), None)
    mode = None if pooling is None else pooling.pooling_mode
    projection = _projection([module for module in text[1:] if module is not pooling], encoder.config.hidden_size)
    if encoder.config.model_type == "clip_text_model" and mode in (None, "lasttoken"):
        weights |= _with_prefix("text_model", encoder)
        weights["text_projection.weight"] = projection
        config = {"text_config": encoder.config.to_dict(), "vision_config": vision.config.to_dict()}
        _write(out, form, weights, config, towers, logit_scale)
    elif form == "open_clip" and encoder.config.model_type in HF_FAMILIES and mode in HF_POOLERS:
        _write_with_hf_text(out, weights, encoder, HF_POOLERS[mode], projection, towers, logit_scale)
    else:
        wanted = f", or {', '.join(HF_FAMILIES)} with mean or cls pooling" if form == "open_clip" else ""
        found = f"{encoder.config.model_type} with pooling {mode}"
        raise InputError(f"expected a text tower that {form} can express, that of CLIP{wanted}, found {found}")


def _write(
    out: Path, form: Format, weights: dict[str, Tensor], config: dict[str, Any], towers: ImageTextTowers, scale: float
) -> None:
    """Write CLIP's weights, by the names of transformers, in one of the forms."""
    weights = {**weights, "logit_scale": torch.tensor(math.log(scale))}
    dim = towers.full_dimension
    if form == "open_clip":
        text = config["text_config"]
        if text["hidden_act"] != config["vision_config"]["hidden_act"]:
            found = f"{text['hidden_act']} and {config['vision_config']['hidden_act']}"
            raise InputError(f"expected one hidden_act in both towers, as open_clip has, found {found}")
        model_cfg = {
            "embed_dim": dim,
            **_vision_settings(config["vision_config"]),
            "text_cfg": {
                "context_length": text["max_position_embeddings"],
                "vocab_size": text["vocab_size"],
                "width": text["hidden_size"],
                "heads": text["num_attention_heads"],
                "layers": text["num_hidden_layers"],
                "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
                # open_clip looks for the files of a tokenizer in the folder only if there is a name.
                "hf_tokenizer_name": "tokenizer",
                **({} if text["eos_token_id"] == 2 else {"pool_type": "eos", "eos_id": text["eos_token_id"]}),
            },
        }
        _write_open_clip(out, model_cfg, open_clip_weights(weights), towers)
        return
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    settings = CLIPConfig(text_config=config["text_config"], vision_config=config["vision_config"], projection_dim=dim)
    model = CLIPModel(settings)
    # Strict: a weight that is missing would keep its random value.
    model.load_state_dict({name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")})
    save_encoder(model, out)
    with writing_weights(out):
        CLIPProcessor(image_processor(towers.image_modules[0]), towers.tokenizer("document").tokenizer).save_pretrained(
            out
        )


def _write_with_hf_text(
    out: Path,
    weights: dict[str, Tensor],
    encoder: Any,
    pooler: str,
    projection: Tensor,
    towers: ImageTextTowers,
    scale: float,
) -> None:
    """Write a CLIP vision transformer and a text encoder of transformers, as open_clip's CustomTextCLIP."""
    weights = open_clip_weights({**weights, "logit_scale": torch.tensor(math.log(scale))})
    # open_clip builds the encoder without its pooler, whose output is not used.
    own = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("pooler.")}
    weights |= {f"text.transformer.{name}": tensor for name, tensor in own.items()}
    weights["text.proj.weight"] = projection
    vision = towers.image_modules[0].auto_model.config.to_dict()
    model_cfg = {
        "embed_dim": towers.full_dimension,
        "custom_text": True,
        **_vision_settings(vision),
        "text_cfg": {
            "hf_model_name": str(out.resolve()),
            "hf_model_pretrained": False,
            "hf_tokenizer_name": str(out.resolve()),
            "hf_proj_type": "linear",
            "hf_pooler_type": pooler,
            "context_length": towers.tokenizer("document").max_length,
        },
    }
    with writing_weights(out):
        encoder.config.save_pretrained(out)
    _write_open_clip(out, model_cfg, weights, towers)


def _write_open_clip(out: Path, model_cfg: dict[str, Any], weights: dict[str, Tensor], towers: ImageTextTowers) -> None:
    transform = towers.transform
    squash = isinstance(transform.resize, tuple)
    side = transform.resize[0] if isinstance(transform.resize, tuple) else transform.resize
    if transform.size != (side, side) or not math.isclose(transform.scale, 1 / 255):
        raise InputError(
            f"expected images that are resized to the input's size and scaled to 0 to 1, found {transform}"
        )
    with writing_weights(out):
        towers.tokenizer("document").tokenizer.save_pretrained(out)
    save_tensors(weights, out / WEIGHTS)
    preprocess = {
        "mean": list(transform.mean),
        "std": list(transform.std),
        "interpolation": {2: "bilinear", 3: "bicubic"}[transform.resample],
        "resize_mode": "squash" if squash else "shortest",
    }
    write_json(out / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess})


def open_clip_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's weights by the names of open_clip."""
    found: dict[str, Tensor] = {}
    outer = {ours: theirs for theirs, ours in OUTER.items()}
    projections = {ours: theirs for theirs, ours in PROJECTIONS.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        base, _, end = name.rpartition(".")
        if name in projections:
            found[projections[name]] = tensor.T
        elif name in outer or base in outer:
            found[outer.get(name) or f"{outer[base]}.{end}"] = tensor
        elif name == "logit_scale":
            found[name] = tensor
        elif ".layers." in name:
            stack, _, rest = name.partition(".layers.")
            theirs = next(key for key, ours in STACKS.items() if ours == f"{stack}.layers")
            number, _, inner = rest.rpartition(".")[0].partition(".")
            if inner.removeprefix("self_attn.") in ATTENTION:
                parts.setdefault(f"{theirs}.{number}.attn.in_proj_{end}", {})[inner.removeprefix("self_attn.")] = tensor
            else:
                layer = {ours: key for key, ours in LAYER.items()} | {"self_attn.out_proj": "attn.out_proj"}
                found[f"{theirs}.{number}.{layer[inner]}.{end}"] = tensor
    return found | {name: torch.cat([own[part] for part in ATTENTION]) for name, own in parts.items()}


def _vision_settings(vision: dict[str, Any]) -> dict[str, Any]:
    if vision["layer_norm_eps"] != 1e-5:
        raise InputError(f"expected layer_norm_eps 1e-05, open_clip's, found {vision['layer_norm_eps']}")
    if vision["hidden_act"] not in ("gelu", "quick_gelu"):
        raise InputError(f"expected a vision transformer with gelu or quick_gelu, found {vision['hidden_act']}")
    return {
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
    }


def _with_prefix(prefix: str, encoder: Any) -> dict[str, Tensor]:
    """The weights of an encoder as part of a CLIP model; its own names may have the prefix, too."""
    return {f"{prefix}.{name.removeprefix(f'{prefix}.')}": tensor for name, tensor in encoder.state_dict().items()}


def _projection(modules: list[Any], width: int) -> Tensor:
    """The weights [D, width] of the linear projection among the modules after an encoder; without one, the identity."""
    weights = torch.eye(width)
    for module in modules:
        if type(module).__name__ == "Normalize":
            continue
        if type(module).__name__ != "Dense" or module.linear.bias is not None:
            raise InputError(f"expected a linear projection without a bias after each encoder, found {module}")
        if not isinstance(module.activation_function, nn.Identity):
            raise InputError(f"expected a projection without an activation, found {module.activation_function}")
        weights = module.linear.weight.detach().cpu() @ weights
    return weights
