"""Data and configuration of small training runs on images."""

from __future__ import annotations

from pathlib import Path

from image_helpers import SMALL, captioned, image_bytes, letter_tokenizer, write_shards, write_tar

from retriever.cli.terminal import Terminal
from retriever.config.data import DataConfig
from retriever.config.images import ImageConfig, ImageSource
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.training.trainer import Trainer


def write_data(folder: Path) -> None:
    """Write shards of 32 pairs, the same as a dev set, and a tokenizer."""
    write_shards(folder / "set")
    letter_tokenizer().save_pretrained(folder / "tokenizer")
    members: list[tuple[str, bytes]] = []
    for number, (image, caption) in enumerate(captioned()):
        members += [(f"{number}.png", image_bytes(image)), (f"{number}.txt", caption.encode())]
    write_tar(folder / "dev" / "test" / "0.tar", members)
    (folder / "dev" / "dataset_type.txt").write_text("retrieval\n")


def run_config(data_folder: Path, out: Path) -> TrainConfig:
    """The configuration of a run on the data of `write_data`."""
    return TrainConfig(
        out=str(out),
        model=ModelConfig(
            architecture={"model_type": "bert", **SMALL, "max_position_embeddings": 16},
            tokenizer=str(data_folder / "tokenizer"),
            projection=16,
            image=ImageConfig(name="tiny", size=32),
        ),
        data=DataConfig(
            images=(ImageSource(str(data_folder / "set" / "{000..001}.tar"), caption=("json:captions",)),), workers=0
        ),
        loss=LossConfig(learn_logit_scale=True, symmetric=True),
        optim=OptimConfig(lr=1e-3),
        batch_size=16,
        epochs=4,
        micro_batch_tokens=100,
        log_every=1,
        checkpoint_every=3,
        precision="fp32",
    )


def train(config: TrainConfig) -> Path:
    """Train, and return the folder of the model."""
    return Trainer.start(config, Terminal()).train()
