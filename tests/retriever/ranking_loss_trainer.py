"""Script `ranking_loss_trainer.py FOLDER`: SentenceTransformerTrainer on two gloo processes.

FOLDER contains a model. The trained weights of each loss are written to it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from forks import on_ranks
from ranking_loss_helpers import LEARNING_RATE, triplets
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from retriever.sentence_transformers import CachedInfCLRankingLoss, InfCLRankingLoss

ROWS = 8
CACHED: dict[str, Any] = {"mini_batch_num_tokens": 9, "exchange": "ring"}


def train(
    folder: Path,
    out: Path,
    make: Any,
    *,
    batch: int = ROWS,
    resume: str | None = None,
    rows: int = ROWS,
    **options: Any,
) -> Any:
    """Train for three epochs of SGD and return the trainer. `make` returns the loss for a model."""
    settings: dict[str, Any] = {
        "num_train_epochs": 3, "optim": "sgd", "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        str(out), per_device_train_batch_size=batch, **(settings | options)
    )
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=triplets(rows), loss=make(model))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def on_two_ranks(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = rank = os.environ["RANK"]
    for name, make in (
        ("plain", InfCLRankingLoss),
        ("cached", lambda model: CachedInfCLRankingLoss(model, **CACHED)),
    ):
        trainer = train(folder, folder / "out", make, batch=ROWS // 2, ddp_backend="gloo")
        weights = trainer.model.state_dict() | {"scale": torch.tensor(trainer.loss.scale)}
        save_file(weights, folder / f"{name}{rank}.safetensors")
    trainer = train(
        folder, folder / "out", lambda model: CachedInfCLRankingLoss(model, **CACHED), batch=ROWS // 2, rows=2 * ROWS,
        gradient_accumulation_steps=2, ddp_backend="gloo",
    )  # fmt: skip
    weights = trainer.model.state_dict() | {"scale": torch.tensor(trainer.loss.scale)}
    save_file(weights, folder / f"accumulated{rank}.safetensors")


if __name__ == "__main__":
    on_ranks(2, lambda: on_two_ranks(Path(sys.argv[1])))
