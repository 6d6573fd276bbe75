"""Batches from topic clusters: rows of one cluster, merged where they are few, the same when a run is resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from cli_helpers import write_lines

import retriever.mining.clusters as clusters_module
from index.files import InputError
from index.progress import Reporter, SilentReporter
from retriever.config.data import DataConfig
from retriever.config.model import ModelConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.data.schedules.clustered import ClusteredSchedule, merge_small
from retriever.distributed.ranks import DryRunRanks
from retriever.training.trainer import Trainer


def test_every_row_occurs_once_per_epoch_in_batches_of_one_cluster() -> None:
    random = np.random.default_rng(0)
    of_row = [random.integers(0, 3, size=60), random.integers(0, 2, size=30)]
    clusters = [[np.flatnonzero(of == c) for c in range(of.max() + 1)] for of in of_row]

    def plan() -> ClusteredSchedule:
        return ClusteredSchedule(clusters, batch_size=5, seed=3, epochs=4, names=["a", "b"])

    schedule = plan()
    counts = [np.zeros(60, np.int64), np.zeros(30, np.int64)]
    for step in range(len(schedule)):
        ((source, rows),) = schedule.blocks(step)
        assert len(set(rows.tolist())) == 5 and len(np.unique(of_row[source][rows])) == 1
        counts[source][rows] += 1
        ((again, same),) = plan().blocks(step)
        assert again == source and np.array_equal(rows, same)
    assert len(schedule) == 72 and all(abs(count - 4).max() <= 1 for count in counts)
    weighted = ClusteredSchedule(clusters, batch_size=5, seed=3, steps=300, weights=[1, 2], names=["a", "b"])
    assert weighted.describe()[0].startswith("a: 100 of 300 batches (33.3%), from 3 clusters of ")


def test_small_clusters_join_the_nearest_one() -> None:
    centroids = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [-1, 0]])
    assignment = np.repeat([0, 1, 2, 3], [5, 2, 6, 1])
    merged = merge_small(assignment, centroids, 4)
    assert [rows.tolist() for rows in merged] == [[*range(7)], [*range(7, 14)]]
    assert [len(rows) for rows in merge_small(assignment, centroids, 100)] == [14]


def test_a_run_reads_its_clusters_again(tiny: ModelConfig, tmp_path: Path) -> None:
    words = ("aaaa aaa", "bb bbbbb")
    rows: list[object] = [{"query": f"q{i}", "positive": f"{words[i % 2]} {'ab'[i % 2] * (i % 5)}"} for i in range(40)]
    config = TrainConfig(
        out=str(tmp_path / "run"),
        model=tiny,
        data=DataConfig(sources=(SourceConfig(str(write_lines(tmp_path / "a.jsonl", rows))),), workers=0, clusters=2),
        batch_size=8,
        steps=2,
        precision="fp32",
    )
    trainer = Trainer.start(config, Reporter())
    batches = [trainer.batches.batch(step) for step in range(2)]
    assert all(len({text[0] for text in batch.passages}) == 1 for batch in batches), "one topic in each batch"
    assert trainer.towers.training
    with mock.patch.object(clusters_module, "_k_means", side_effect=AssertionError):
        again = Trainer.resume(tmp_path / "run", Reporter())
        assert [again.batches.batch(step).queries for step in range(2)] == [batch.queries for batch in batches]
        # A plan embeds nothing.
        Trainer(replace(config, out=str(tmp_path / "plan")), tmp_path / "plan", SilentReporter(), DryRunRanks()).plan()
    (file,) = (tmp_path / "run" / "cache").glob("clusters-*.npz")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"clusters-.*\.npz: damaged"):
        Trainer.resume(tmp_path / "run", Reporter())
    with pytest.raises(ValueError, match=r"data\.mix: expected steps with data\.clusters"):
        replace(config.data, mix="pool")
