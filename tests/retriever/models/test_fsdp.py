"""Sharded encoders equal replicated ones; test_train_on_ranks.py trains with several processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import distributed

from retriever.config.images import ImageConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.models.fsdp import is_sharded, shard_encoders
from retriever.models.images.towers import build_image_text_towers
from retriever.models.sharded_tensors import clip_gradients, full_tensor
from retriever.models.tokenizer import TokenizedTexts


@pytest.fixture
def group() -> Iterator[None]:
    """A process group with a single process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("recomputed", [False, True])
def test_sharded_image_text_towers_equal_replicated_ones(group: None, tiny: ModelConfig, recomputed: bool) -> None:
    config = dataclasses.replace(tiny, image=ImageConfig(name="tiny"), projection=16, dropout=0.0)
    torch.manual_seed(0)
    plain = build_image_text_towers(config)
    torch.manual_seed(0)
    sharded = build_image_text_towers(config)
    if recomputed:
        sharded.enable_gradient_checkpointing()
    shard_encoders(sharded, "fp32", torch.device("cpu"), 1)
    assert is_sharded(sharded) and not is_sharded(plain)
    pixels = torch.randint(0, 256, (3, 3, *plain.transform.size), dtype=torch.uint8)
    texts = TokenizedTexts(np.arange(12, dtype=np.int32) % 5, np.array([0, 5, 12]))
    for towers in (plain, sharded):
        for embeddings in (towers.embed_pixels(pixels), towers.embed(texts, np.arange(2), "document")):
            embeddings.backward(torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings))
    norms = [clip_gradients(towers.parameters(), 0.5) for towers in (plain, sharded)]
    assert float(norms[0]) > 0.5
    torch.testing.assert_close(norms[1], norms[0])
    found = dict(sharded.named_parameters())
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == (found[name].grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(full_tensor(found[name].grad), parameter.grad)


def test_unsupported_settings_of_sharded_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="precision: expected auto, bf16 or fp32 with shard_towers, found fp16"):
        TrainConfig(shard_towers=True, precision="fp16")
    with pytest.raises(ValueError, match=r"optim\.name: expected adamw with shard_towers, found adafactor"):
        TrainConfig(shard_towers=True, optim=OptimConfig(name="adafactor"))
