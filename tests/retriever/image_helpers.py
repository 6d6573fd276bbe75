"""Generated images, and small image–text models with random weights."""

from __future__ import annotations

import io
import json
import shutil
import string
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "orange", "purple", "black", "gold", "cyan")
SHAPES = ("circle", "square", "cross", "stripe")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def draw(color: str, shape: str, size: tuple[int, int] = (48, 40), shift: int = 0) -> Image.Image:
    """Return an image of a shape in one color on white."""
    image = Image.new("RGB", size, "white")
    pen, (width, height) = ImageDraw.Draw(image), size
    box = (8 + shift, 8, width - 8 + shift, height - 8)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "cross":
        pen.line(box, fill=color, width=6)
        pen.line((box[0], box[3], box[2], box[1]), fill=color, width=6)
    else:
        pen.rectangle((0, height // 2 - 5 + shift, width, height // 2 + 5 + shift), fill=color)
    return image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample_images() -> list[Image.Image]:
    """Images of several shapes, smaller and larger than the input of a tower."""
    return [noise(60, 40), noise(40, 60, 1), noise(32, 32, 2), noise(90, 21, 3)]


def letter_tokenizer() -> Any:
    """Return a tokenizer of single letters with special tokens like CLIP's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase + string.digits
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *(f"##{letter}" for letter in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", model_max_length=16, **names
    )


def save_checkpoint(kind: str, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Save a CLIP or SigLIP checkpoint; returns the model, the processor and its padding arguments."""
    import transformers

    tokenizer = letter_tokenizer()
    ids = {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    text = {**SMALL, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    padding: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 16}
    if kind == "clip":
        settings = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(settings)
        crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**crop), tokenizer)
    elif kind == "siglip":
        settings = transformers.SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision)
        model = transformers.SiglipModel(settings)
        images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
        processor = transformers.SiglipProcessor(images, tokenizer)
        padding = {"padding": "max_length", "truncation": True, "max_length": 16, "return_attention_mask": False}
    else:
        vision = {**SMALL, "patch_size": 8, "num_patches": 16}
        settings = transformers.Siglip2Config(text_config={**text, "projection_size": 32}, vision_config=vision)
        model = transformers.Siglip2Model(settings)
        images = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
        processor = transformers.Siglip2Processor(images, tokenizer)
        padding = {"padding": "max_length", "truncation": True, "max_length": 16, "return_attention_mask": False}
    with torch.no_grad():
        # Larger weights than by default, so that embeddings differ.
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, padding


def cache_as_hub_name(model: Path, hub: Path) -> str:
    """Copy a model folder into a hub cache; returns its hub name."""
    cached = hub / "models--acme--clip"
    shutil.copytree(model, cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    return "acme/clip"


def save_vision_encoder(kind: str, folder: Path) -> Path:
    """Save a ViT or DINOv2 with random weights and its image processor."""
    import transformers

    if kind == "vit":
        transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        settings = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
        model = transformers.Dinov2Model(transformers.Dinov2Config(**settings, image_size=32, patch_size=8))
        model.save_pretrained(folder)
        crop = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
        transformers.BitImageProcessor(**crop).save_pretrained(folder)
    return folder


def differing_texts() -> list[str]:
    """Return texts that are short, empty, and longer than the maximum length."""
    return ["a cat", "two dogs run", "", "a very long caption about nothing at all"]


def captioned() -> list[tuple[Image.Image, str]]:
    """Return every shape in every color, with its caption."""
    return [(draw(color, shape), f"{color} {shape}") for color in COLORS for shape in SHAPES]


def image_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar with these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, shards: int = 2) -> str:
    """Write all captioned images as webdataset tars with txt and json; returns their pattern."""
    pairs = captioned()
    for shard in range(shards):
        members: list[tuple[str, bytes]] = []
        for number in range(shard, len(pairs), shards):
            image, caption = pairs[number]
            about = {"caption": caption, "captions": [caption, f"a {caption}"]}
            kind = ("png", "jpg", "webp")[number % 3]
            content = image_bytes(image, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind])
            members += [
                (f"{number:05}.{kind}", content),
                (f"{number:05}.txt", caption.encode()),
                (f"{number:05}.json", json.dumps(about).encode()),
            ]
        write_tar(folder / f"{shard:03}.tar", members)
    return str(folder / f"{{000..{shards - 1:03}}}.tar")
