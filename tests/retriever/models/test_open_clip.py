"""open_clip's checkpoints are read and written; what transformers' CLIP lacks is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import assert_refused, command
from image_helpers import SMALL, letter_tokenizer, noise, save_checkpoint
from safetensors.torch import load_file

import retriever
from index.files import InputError
from retriever.config.images import ImageConfig
from retriever.config.model import ModelConfig
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.model import Model
from retriever.models.images.open_clip import CONFIG, WEIGHTS
from retriever.models.images.towers import build_image_text_towers

IMAGES, TEXTS = [noise(90, 70), noise(64, 64, 2)], ["a cat", "two dogs run"]


def from_scratch(architecture: dict[str, Any], pooling: str, projection: int | None, tmp_path: Path) -> Model:
    letter_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = ModelConfig(
        architecture={**SMALL, "max_position_embeddings": 16, **architecture},
        tokenizer=str(tmp_path / "tokenizer"),
        pooling=pooling,
        projection=projection,
        image=ImageConfig(name="tiny"),
    )
    towers = build_image_text_towers(config).eval()
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return Model("scratch", towers, EncodeOptions())


def assert_same(first: Model, second: Model) -> None:
    assert np.allclose(first.encode_images(IMAGES), second.encode_images(IMAGES), atol=1e-6)
    assert np.allclose(first.encode_queries(TEXTS), second.encode_queries(TEXTS), atol=1e-6)


def test_a_model_survives_both_forms(tmp_path: Path) -> None:
    save_checkpoint("clip", tmp_path / "clip")
    clip = retriever.load(tmp_path / "clip", device="cpu")
    gelu = {"model_type": "clip_text_model", "hidden_act": "gelu"}
    for number, model in enumerate((clip, from_scratch(gelu, "lasttoken", 24, tmp_path))):
        for form in ("open_clip", "transformers"):
            out = tmp_path / f"{form} {number}"
            retriever.export_clip(model, out, form=form, logit_scale=20)
            assert_same(retriever.load(out, device="cpu"), model)
        weights = load_file(tmp_path / f"open_clip {number}" / WEIGHTS)
        assert weights["logit_scale"].exp().item() == pytest.approx(20)
    with pytest.raises(InputError, match="expected a new or empty folder"):
        retriever.export_clip(clip, tmp_path / "open_clip 0")


def test_the_command_writes_both_forms(tmp_path: Path) -> None:
    save_checkpoint("clip", tmp_path / "model")
    model = retriever.load(tmp_path / "model", device="cpu")
    for form in ("open_clip", "clip"):
        out = tmp_path / form
        words = ["export", "--model", tmp_path / "model", "--format", form, "--out", out, "--logit-scale", 20, "--json"]
        done = command(*words)
        assert done.code == 0, done.err
        assert json.loads(done.out) == {"folder": str(out), "format": form}
        assert_same(retriever.load(out, device="cpu"), model)
    assert load_file(tmp_path / "open_clip" / WEIGHTS)["logit_scale"].exp().item() == pytest.approx(20)
    assert_refused(command(*words), 1, "expected a new or empty folder")
    words[words.index("clip")] = "onnx"
    assert_refused(command(*words), 2, "--logit-scale: expected none with format onnx, found 20")
    assert_refused(command("export", "--model", tmp_path / "model", "--out", out, "--format", "timm"), 2, "--format")


def test_what_a_form_cannot_express_is_refused(tmp_path: Path) -> None:
    save_checkpoint("clip", tmp_path / "clip")
    good = retriever.export_clip(tmp_path / "clip", tmp_path / "good")
    about = json.loads((good / CONFIG).read_text())
    for section, name, value, message in (
        ("vision_cfg", "timm_model_name", "vit_b", r"vision_cfg\.timm_model_name: expected none, .* found 'vit_b'"),
        ("vision_cfg", "pool_type", "avg", r"vision_cfg\.pool_type: expected 'tok', .* found 'avg'"),
        ("text_cfg", "no_causal_mask", True, r"text_cfg\.no_causal_mask: expected none"),
        ("text_cfg", "width", 16, r"open_clip_model\.safetensors: expected weights for text_model"),
        ("vision_cfg", "image_size", [32, 16], r"vision_cfg\.image_size: expected a whole number"),
        (None, "multimodal_cfg", {"layers": 2}, r"model_cfg\.multimodal_cfg: expected none"),
    ):
        changed = json.loads(json.dumps(about))
        (changed["model_cfg"] if section is None else changed["model_cfg"][section])[name] = value
        (good / CONFIG).write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message) as caught:
            retriever.load(good, device="cpu")
        assert "\n" not in str(caught.value)
    (good / CONFIG).write_text(json.dumps(about))
    (good / WEIGHTS).rename(good / "weights")
    with pytest.raises(InputError, match=r"open_clip_model\.safetensors: no such file"):
        retriever.load(good, device="cpu")
    quick = from_scratch({"model_type": "clip_text_model"}, "lasttoken", 24, tmp_path)
    bert = from_scratch({"model_type": "bert"}, "mean", 24, tmp_path)
    for model, form, message in (
        (quick, "open_clip", "scratch: expected one hidden_act in both towers, as open_clip has, found quick_gelu"),
        (bert, "transformers", "scratch: expected a text tower that transformers can express, that of CLIP, found b"),
    ):
        with pytest.raises(InputError, match=message):
            retriever.export_clip(model, tmp_path / "refused", form=form)
        assert not (tmp_path / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "clip_text_model", "bert mean", "bert cls"])
def test_open_clip_itself_gives_the_same_embeddings(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", exc_type=ImportError)
    from open_clip.model import CLIP, CustomTextCLIP

    if kind == "clip":
        save_checkpoint("clip", tmp_path / "clip")
        model = retriever.load(tmp_path / "clip", device="cpu")
    else:
        name, _, pooling = kind.partition(" ")
        model = from_scratch({"model_type": name, "hidden_act": "gelu"}, pooling or "lasttoken", 24, tmp_path)
    out = retriever.export_clip(model, tmp_path / "out")
    config = json.loads((out / CONFIG).read_text())["model_cfg"]
    theirs = (CustomTextCLIP if config.pop("custom_text", False) else CLIP)(**config).eval()
    theirs.load_state_dict(load_file(out / WEIGHTS), strict=True)
    tokenizer = model.towers.tokenizer("document").tokenizer
    ids = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    pixels = torch.stack([model.image_towers().transform(image) for image in IMAGES])
    with torch.no_grad():
        images, texts = theirs.encode_image(pixels, normalize=True), theirs.encode_text(ids, normalize=True)
    assert np.allclose(images.numpy(), model.encode_images(IMAGES), atol=1e-6)
    assert np.allclose(texts.numpy(), model.encode_queries(TEXTS), atol=1e-6)
