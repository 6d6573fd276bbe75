"""Image–text towers give the embeddings of transformers, before and after saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_helpers import (
    SMALL,
    cache_as_hub_name,
    differing_texts,
    letter_tokenizer,
    noise,
    sample_images,
    save_checkpoint,
    save_vision_encoder,
)

from index.files import InputError
from retriever.config.images import ImageConfig
from retriever.config.model import ModelConfig
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.image_encoder import embed_images
from retriever.errors import ConfigError
from retriever.models.images.architectures import vision_config
from retriever.models.images.folder import is_image_text_model
from retriever.models.images.towers import ImageTextTowers, build_image_text_towers, load_image_text_towers

BERT = {"model_type": "bert", **SMALL, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def pair(tokenizer: str, name: str, projection: int | None = 20, **image: Any) -> ModelConfig:
    return ModelConfig(
        architecture=BERT, tokenizer=tokenizer, projection=projection, image=ImageConfig(name=name, **image)
    )


def saved(towers: ImageTextTowers, folder: Path) -> Path:
    folder.mkdir()
    towers.save(folder)
    return folder


def embeddings(towers: ImageTextTowers) -> tuple[np.ndarray, np.ndarray]:
    # This budget gives one image at a time.
    images = embed_images(towers, sample_images(), EncodeOptions(micro_batch_tokens=40))
    return images, embed_texts(towers, differing_texts(), "document", EncodeOptions())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_checkpoints_give_the_embeddings_of_transformers(kind: str, tmp_path: Path) -> None:
    model, processor, padding = save_checkpoint(kind, tmp_path / kind)
    towers = load_image_text_towers(str(tmp_path / kind))
    images, texts = embeddings(towers)
    with torch.no_grad():
        pixels = processor(images=sample_images(), return_tensors="pt")
        ids = processor.tokenizer(differing_texts(), return_tensors="pt", return_token_type_ids=False, **padding)
        theirs = [model.get_image_features(**pixels).pooler_output, model.get_text_features(**ids).pooler_output]
    for ours, other in zip((images, texts), theirs, strict=True):
        expected = torch.nn.functional.normalize(other, dim=-1).numpy()
        assert ours.dtype == np.float32 and np.ptp(expected, axis=0).mean() > 0.02
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["clip", "siglip", "vit", "dinov2", "tiny", "tiny-resnet", "half of clip", "half of siglip"]
)
def test_a_saved_folder_gives_the_same_embeddings(kind: str, tmp_path: Path, tokenizer: str) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "encoder"
    if "clip" in kind or "siglip" in kind:
        save_checkpoint(kind.removeprefix("half of "), folder)
    if kind in ("clip", "siglip"):
        towers = load_image_text_towers(str(folder))
    else:
        if kind in ("vit", "dinov2"):
            save_vision_encoder(kind, folder)
        towers = build_image_text_towers(pair(tokenizer, kind if "tiny" in kind else str(folder))).eval()
    images, texts = embeddings(towers)
    path = saved(towers, tmp_path / "model")
    assert is_image_text_model(str(path))
    model = SentenceTransformer(str(path), device="cpu")
    np.testing.assert_allclose(model.encode(sample_images()), images, atol=1e-5)
    np.testing.assert_allclose(model.encode(differing_texts()), texts, atol=1e-5)
    again = load_image_text_towers(str(path))
    assert again.fingerprint() == towers.fingerprint() and again.dimension == images.shape[1]
    for one, other in zip(embeddings(again), (images, texts), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "millions"),
    # Without heads: Touvron et al. (arXiv 2012.12877), Dosovitskiy et al. (arXiv 2010.11929), Radford et al. (CLIP).
    [("ViT-S/16", 21.7), ("ViT-B/32", 87.5), ("ViT-B/16", 85.8), ("ViT-L/16", 303.3), ("ViT-L/14", 303.2)],
)
def test_named_architectures_have_the_published_sizes(name: str, millions: float) -> None:
    from transformers import CLIPVisionModel

    settings = vision_config(name, 224)
    with torch.device("meta"):
        encoder = CLIPVisionModel(settings)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert settings.hidden_size == 64 * settings.num_attention_heads


def test_without_a_projection_the_dimension_is_the_image_encoders(tokenizer: str) -> None:
    towers = build_image_text_towers(pair(tokenizer, "tiny", projection=None))
    assert towers.dimension == 128
    assert [type(m).__name__ for m in towers._image] == ["Transformer", "Normalize"]


def test_images_are_projected_into_the_space_of_the_text_tower(tokenizer: str, tmp_path: Path) -> None:
    towers = build_image_text_towers(pair(tokenizer, "tiny", projection=None, into_text_space=True, lock="text"))
    assert towers.dimension == BERT["hidden_size"]
    assert [type(module).__name__ for module in towers.text_modules] == ["Transformer", "Pooling", "Normalize"]
    assert type(towers.image_modules[-2]).__name__ == "Dense"
    trained = [name for name, weight in towers.named_parameters() if weight.requires_grad]
    assert trained and not any(".text." in name for name in trained)
    towers.save(tmp_path)
    assert load_image_text_towers(str(tmp_path)).dimension == towers.dimension
    with pytest.raises(ValueError, match=r"model\.projection: expected none with model\.image\.into_text_space"):
        pair(tokenizer, "tiny", into_text_space=True)
    with pytest.raises(ValueError, match=r"model\.image\.into_text_space: expected false"):
        ModelConfig(image=ImageConfig(name="clip", into_text_space=True))
    for ignored in ({"into_text_space": True}, {"lock": "text"}, {"flip": True}):
        with pytest.raises(ValueError, match=r"model\.image\..*: expected the default without model\.image\.name"):
            ModelConfig(name="bert", image=ImageConfig(**ignored))


@pytest.mark.parametrize("kind", ["tiny", "tiny-resnet"])
def test_embeddings_of_files_and_images_are_equal_in_any_batch(kind: str, tmp_path: Path, tokenizer: str) -> None:
    towers = build_image_text_towers(pair(tokenizer, kind)).eval()
    paths = []
    for number, image in enumerate(sample_images()):
        image.save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    counts: list[int] = []
    together = embed_images(towers, paths, EncodeOptions(), counts.append)
    alone = np.concatenate([embed_images(towers, [image], EncodeOptions()) for image in sample_images()])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert sum(counts) == 4 and embed_images(towers, [], EncodeOptions()).shape == (0, 20)
    (tmp_path / "2.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"2\.png: expected an image"):
        embed_images(towers, paths, EncodeOptions(micro_batch_tokens=1))


def test_locked_towers_are_frozen_and_stay_in_evaluation_mode(tokenizer: str) -> None:
    for which in ("image", "text"):
        towers = build_image_text_towers(pair(tokenizer, "tiny", lock=which))
        image, text = towers._image[0], towers._transformer("document")
        locked, free = (image, text) if which == "image" else (text, image)
        assert not any(p.requires_grad for p in locked.parameters()) and not locked.training
        assert all(p.requires_grad for p in free.parameters()) and free.training
        heads = [m for m in (*towers._image, *towers._text_model[0]) if type(m).__name__ == "Dense"]
        assert len(heads) == 2 and all(m.linear.weight.requires_grad for m in heads)


def test_one_encoder_of_a_checkpoint_can_be_locked(tmp_path: Path) -> None:
    save_checkpoint("clip", tmp_path / "clip")
    towers = build_image_text_towers(ModelConfig(image=ImageConfig(name=str(tmp_path / "clip"), lock="image")))
    learning = [name for name, p in towers.named_parameters() if p.requires_grad]
    assert learning and not any("vision_model" in name or "visual_projection" in name for name in learning)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_hub_name_is_the_checkpoint_of_that_name(
    kind: str, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(kind, folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name = cache_as_hub_name(folder, tmp_path / "hub")
    for make in (
        load_image_text_towers,
        lambda path: build_image_text_towers(ModelConfig(image=ImageConfig(name=path))).eval(),
        # The image encoder alone; the projections are random.
        lambda path: build_image_text_towers(pair(tokenizer, path)).eval(),
    ):
        local, hub = make(str(folder)), make(name)
        assert [type(m.auto_model) for m in hub.transformers] == [type(m.auto_model) for m in local.transformers]
        pixels = torch.stack([local.transform.pixels(image) for image in sample_images()])
        assert torch.equal(hub.image_features(pixels), local.image_features(pixels))
    with pytest.raises(ConfigError, match=r"model\.image\.size: expected none for a trained encoder"):
        build_image_text_towers(pair(tokenizer, name, size=32))
    with pytest.raises(InputError, match="acme/none: no such folder, and not in the cache of the hub"):
        load_image_text_towers("acme/none")


@pytest.mark.parametrize("kind", ["ResNet", "ConvNext", "Swin", "IJepa", "Dinov2WithRegisters"])
def test_encoders_without_a_class_token_are_pooled_by_the_mean(kind: str, tmp_path: Path, tokenizer: str) -> None:
    import transformers

    stages = {"hidden_sizes": [8, 24], "depths": [1, 1], "embedding_size": 8, "num_stages": 2}
    settings: dict[str, Any] = {
        "ResNet": {**stages, "layer_type": "basic"},
        "ConvNext": stages,
        "Swin": {"image_size": 32, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4},
    }.get(kind, {**SMALL, "image_size": 32, "patch_size": 8})
    settings.pop("intermediate_size", None)
    encoder = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    encoder.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    towers = build_image_text_towers(pair(tokenizer, str(tmp_path), projection=None, lock="image"))
    pixels = torch.stack([towers.transform.pixels(image) for image in sample_images()])
    with torch.no_grad():
        outputs = encoder(towers.transform.normalize(pixels)).last_hidden_state
        outputs = outputs.flatten(2).transpose(1, 2) if outputs.ndim == 4 else outputs
        expected = outputs[:, 0] if kind == "Dinov2WithRegisters" else outputs.mean(dim=1)
        torch.testing.assert_close(towers.image_features(pixels), expected, atol=1e-5, rtol=1e-4)
    if kind == "ResNet":
        with pytest.raises(ConfigError, match=r"expected an encoder without batch normalization.*; found ResNetModel"):
            build_image_text_towers(pair(tokenizer, str(tmp_path)))
    if kind in ("ConvNext", "Swin"):
        with pytest.raises(ConfigError, match=r"patch_dropout: not supported for .*; expected 0"):
            build_image_text_towers(pair(tokenizer, str(tmp_path), patch_dropout=0.5))


@pytest.mark.parametrize("kind", ["tiny", "vit", "dinov2"])
def test_patch_dropout_drops_patches_in_training_only(kind: str, tmp_path: Path, tokenizer: str) -> None:
    name = kind if kind == "tiny" else str(save_vision_encoder(kind, tmp_path / kind))
    towers = build_image_text_towers(pair(tokenizer, name, patch_dropout=0.75))
    encoder = towers._image[0].auto_model
    lengths: list[int] = []
    layer = next(m for n, m in encoder.named_modules() if n.endswith(("layers.0", "layer.0")))
    layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    pixels = torch.stack([towers.transform.pixels(noise(70, 70, seed)) for seed in range(3)])
    torch.manual_seed(0)
    one, again = towers({"pixels": pixels}), towers({"pixels": pixels})
    torch.manual_seed(0)
    repeated = towers({"pixels": pixels})
    towers.eval()
    towers({"pixels": pixels})
    patches = 64 if kind == "tiny" else 16
    assert lengths == [patches // 4 + 1] * 3 + [patches + 1]
    assert torch.equal(one, repeated) and not torch.allclose(one, again, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(tokenizer: str) -> None:
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        towers = build_image_text_towers(pair(tokenizer, "tiny"))
        if on:
            towers.enable_gradient_checkpointing()
        pixels = torch.stack([towers.transform.pixels(image) for image in sample_images()])
        towers({"pixels": pixels})[:, 0].sum().backward()
        gradients.append(towers._image[0].auto_model.embeddings.patch_embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def test_invalid_image_text_models_are_one_line_errors(tmp_path: Path, tokenizer: str, minilm: str) -> None:
    with pytest.raises(InputError, match="does not embed images"):
        load_image_text_towers(minilm)
    with pytest.raises(InputError, match="no such model folder"):
        load_image_text_towers(str(tmp_path / "none"))
    save_checkpoint("siglip2", tmp_path / "naflex")
    message = r"naflex: expected an image processor that resizes to a fixed .*, found Siglip2Image.* not NaFlex\)"
    with pytest.raises(InputError, match=message):
        load_image_text_towers(str(tmp_path / "naflex"))
    with pytest.raises(ConfigError, match="expected a text tower"):
        build_image_text_towers(ModelConfig(image=ImageConfig(name="tiny")))
    with pytest.raises(InputError, match="acme/none: no such folder"):
        build_image_text_towers(ModelConfig(image=ImageConfig(name="acme/none")))
    with pytest.raises(ConfigError, match="multiple of tiny's patches of 8 pixels, found 30"):
        build_image_text_towers(pair(tokenizer, "tiny", size=30))
    with pytest.raises(InputError, match=r"ViT-Z: no such folder, .* \(new ones are tiny, ViT-S/16,"):
        build_image_text_towers(pair(tokenizer, "ViT-Z"))
    # A name that does not exist is not a trained encoder.
    with pytest.raises(InputError, match="ViT-L/15: no such folder"):
        build_image_text_towers(pair(tokenizer, "ViT-L/15", size=64))
    with pytest.raises(InputError, match="expected a vision encoder, found BertModel"):
        build_image_text_towers(pair(tokenizer, minilm))
    assert not is_image_text_model(minilm) and not is_image_text_model(str(tmp_path))
