"""Pairs of images and captions, and towers for them, without files: random weights, pixels and token ids."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace

import numpy as np
import torch

from retriever.config.images import ImageConfig
from retriever.config.model import ModelConfig
from retriever.data.images.batches import ImageInputs
from retriever.data.micro_batches import PreparedBatch
from retriever.models.images.towers import ImageTextTowers, build_image_text_towers
from retriever.models.tokenizer import TokenizedTexts

# Size of CLIP's text tower for ViT-B/16 (arXiv 2103.00020, table 20), as a BERT with bidirectional attention.
TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
VOCABULARY_SIZE, MAX_LENGTH = 49408, 77


def build_towers_of(name: str, *, lock: bool) -> ImageTextTowers:
    """New towers with random weights, and a tokenizer without words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special.values())}, unk_token="<unk>"))
    text = TEXT if name != "tiny" else {**TEXT, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=MAX_LENGTH, **special).save_pretrained(folder)
        return build_image_text_towers(
            ModelConfig(
                architecture={
                    "model_type": "bert",
                    **text,
                    "vocab_size": VOCABULARY_SIZE,
                    "max_position_embeddings": MAX_LENGTH,
                },
                tokenizer=folder,
                pooling="mean",
                projection=512,
                dropout=0.0,
                image=ImageConfig(name=name, lock="image" if lock else "none"),
            )
        )


def random_captions(size: int) -> TokenizedTexts:
    """Random token ids with the lengths of web captions."""
    rng = np.random.default_rng(0)
    # CC3M has 10 words per caption, LAION-400M 9 (arXiv 2111.02114).
    lengths = np.clip(rng.lognormal(np.log(14), 0.5, size).round(), 4, MAX_LENGTH).astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return TokenizedTexts(rng.integers(4, VOCABULARY_SIZE, offsets[-1], dtype=np.int32), offsets)


@dataclass(frozen=True)
class RepeatedImages(ImageInputs):
    """A few images that stand for `count`. Each micro-batch copies as many bytes as real ones would."""

    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def lengths(self) -> np.ndarray:
        """See `ImageInputs`."""
        return np.full(self.count, self.tokens_each, dtype=np.int64)

    def embed(self, towers: ImageTextTowers, rows: np.ndarray) -> torch.Tensor:
        """See `ImageInputs`."""
        first = int(rows[0]) % (len(self.pixels) - len(rows) + 1)
        pixels = self.pixels[first : first + len(rows)]
        # Pixels that are already on the device are not copied.
        return towers.embed_pixels(pixels) if pixels.device.type == "cpu" else towers({"pixels": pixels})


def on(batch: PreparedBatch, device: torch.device) -> PreparedBatch:
    """The batch with its pixels on the device."""
    images, texts = batch.groups
    assert isinstance(images, RepeatedImages)
    return replace(batch, groups=[replace(images, pixels=images.pixels.to(device)), texts])
