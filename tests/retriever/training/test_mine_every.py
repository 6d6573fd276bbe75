"""A run that mines its hard negatives again is exactly resumable, and trains on what its own weights rank high."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import MEANINGS, write_lines
from run_helpers import assert_same, results

from index.files import InputError
from index.progress import Reporter
from retriever.config.data import DataConfig
from retriever.config.mining import MiningConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.training.step import TrainStep
from retriever.training.trainer import Trainer
from retriever.utils.interrupt import Interrupted


@pytest.fixture
def config(tiny: ModelConfig, tmp_path: Path) -> TrainConfig:
    pairs = write_lines(
        tmp_path / "pairs.jsonl", [{"query": f"what is a {word}", "positive": text} for word, text in MEANINGS.items()]
    )
    return TrainConfig(
        out=str(tmp_path / "whole"),
        model=tiny,
        data=DataConfig(sources=(SourceConfig(str(pairs)),), workers=0, negatives=1),
        mining=MiningConfig(mined_negatives=2, max_share=None),
        mine_every=3,
        optim=OptimConfig(lr=1e-3),
        batch_size=10,
        steps=8,
        log_every=1,
        checkpoint_every=2,
        precision="fp32",
    )


def test_a_resumed_run_reads_the_negatives_of_the_interrupted_one(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer.start(config, Reporter()).train()
    whole = results(tmp_path / "whole")
    step, batches = TrainStep.__call__, {}

    def interrupted(train_step: TrainStep, batch: Any, number: int, **further: Any) -> Any:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        batches[number] = batch
        return step(train_step, batch, number, **further)

    again = replace(config, out=str(tmp_path / "again"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TrainStep, "__call__", interrupted)
        Trainer.start(again, Reporter()).train()
    # Every query has one mined negative from the first step on.
    assert {len(batch.groups[0]) for batch in batches.values()} == {30}
    mined = Path(again.out) / "mined" / "step-00000003" / "source-0.jsonl"
    kept = mined.read_text()
    mined.write_text(kept.replace("tree", "free"))
    with pytest.raises(InputError, match=r"source-0\.jsonl: damaged"):
        Trainer.resume(Path(again.out), Reporter()).train()
    mined.write_text(kept)
    Trainer.resume(Path(again.out), Reporter()).train()
    assert_same(results(tmp_path / "again"), whole)
    folders = sorted((tmp_path / "whole" / "mined").iterdir())
    assert [folder.name for folder in folders] == ["step-00000000", "step-00000003", "step-00000006"]
    texts = [(folder / "source-0.jsonl").read_text() for folder in folders]
    assert len(set(texts)) == 3, "mined with other weights"
    shutil.rmtree(tmp_path / "again")


def test_negatives_are_those_of_the_current_weights(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer.start(replace(config, steps=6, mine_every=6), Reporter())
    refresh = trainer.components.refresh
    assert refresh is not None
    trainer.towers.eval()
    (table,) = refresh.tables(0, Reporter(), lambda: None)
    model = refresh._model
    queries = model.encode_queries([table[i].query for i in range(20)])
    passages = list(MEANINGS.values())
    scores = queries @ model.encode_passages(passages).T
    for i in range(20):
        ranked = [passages[j] for j in np.argsort(-scores[i]) if j != i][:2]
        assert table[i].negatives == tuple(ranked) and table[i].positives == (passages[i],)

    # A source with hard negatives keeps them until step E; one with teacher's scores is refused.
    rows = [json.loads(line) for line in Path(config.data.sources[0].path).read_text().splitlines()]
    own = write_lines(tmp_path / "own.jsonl", [{**row, "negatives": ["n"]} for row in rows])
    changed = replace(config, data=replace(config.data, sources=(SourceConfig(str(own)),)), out=str(tmp_path / "own"))
    (table,) = Trainer.start(changed, Reporter()).components.refresh.tables(2, Reporter(), lambda: None)  # type: ignore[union-attr]
    assert table[0].negatives == ("n",)
    write_lines(own, [{**row, "scores": [1]} for row in rows])
    with pytest.raises(InputError, match="no teacher's scores with mine_every"):
        Trainer.start(replace(changed, out=str(tmp_path / "scored")), Reporter())
    with pytest.raises(ValueError, match=r"data\.negatives: expected at least 1 with mine_every"):
        replace(config, data=replace(config.data, negatives=0))
