"""Steps with rows of several sources: sizes of the blocks, their order, and a loss for each block or for all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import MEANINGS, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from index.files import InputError
from index.progress import Reporter
from losses import inf_cl_loss
from retriever.config.data import DataConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.data.batches import BatchDataset, Prompts, TrainingBatch
from retriever.data.micro_batches import PreparedBatch
from retriever.data.passage_choice import PassageSettings
from retriever.data.schedules.mixture import MixedSchedule
from retriever.data.schedules.schedule import BatchSchedule
from retriever.data.table import ExampleTable, open_source
from retriever.distributed.share import Share
from retriever.training.trainer import Trainer


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    share=st.floats(0, 1),
    weighted=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_every_step_has_distinct_rows_of_every_source(
    sizes: list[int], share: float, weighted: bool, seed: int
) -> None:
    batch_size = max(2 * len(sizes), int(share * sum(sizes)))
    weights = [float(1 + i) for i in range(len(sizes))] if weighted else None

    def plan() -> MixedSchedule:
        return MixedSchedule(sizes, batch_size=batch_size, seed=seed, weights=weights, steps=7)

    schedule = plan()
    steps = [schedule.blocks(step) for step in range(7)]
    lengths = [[len(rows) for _, rows in blocks] for blocks in steps]
    assert lengths == [lengths[0]] * 7 and sum(lengths[0]) == batch_size
    for source, (size, rows) in enumerate(zip(sizes, lengths[0], strict=True)):
        assert 2 <= rows <= size
        free = [s for s in range(len(sizes)) if 2 < lengths[0][s] < sizes[s]]
        if source in free:
            total = sum((weights or sizes)[s] for s in free)
            wanted = sum(lengths[0][s] for s in free) * (weights or sizes)[source] / total
            assert abs(rows - wanted) < len(sizes)
        order = np.concatenate([blocks[source][1] for blocks in steps])
        for epoch in range(len(order) // size):
            assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    for step in (6, 2, 4):
        for (source, rows), (expected_source, expected) in zip(plan().blocks(step), steps[step], strict=True):
            assert source == expected_source and np.array_equal(rows, expected)


def test_temperature_flattens_the_shares_of_sources() -> None:
    for temperature, shares in ((1.0, [0.9, 0.1]), (2.0, [0.75, 0.25]), (1e9, [0.5, 0.5])):
        steps = BatchSchedule([900, 100], batch_size=10, seed=0, steps=1000, temperature=temperature)
        counts = np.bincount([steps.rows(step)[0] for step in range(1000)])
        np.testing.assert_allclose(counts / 1000, shares, atol=2e-3)
        mixed = MixedSchedule([900, 100], batch_size=100, seed=0, steps=3, temperature=temperature)
        assert [len(rows) for _, rows in mixed.blocks(0)] == [round(100 * share) for share in shares]
    assert mixed.describe() == [
        "source 0: 50 of 100 rows of every step (50.0%), 0.17 passes",
        "source 1: 50 of 100 rows of every step (50.0%), 1.50 passes",
    ]
    for sizes, batch_size, message in (
        ([5, 5], 11, "at least 11 rows"),
        ([5, 5], 3, "at least 4, 2 rows for each of 2 sources"),
        ([5, 1], 4, "source 1: expected at least 2 rows"),
    ):
        with pytest.raises(InputError, match=message):
            MixedSchedule(sizes, batch_size=batch_size, seed=0, steps=1)


def as_given(batch: TrainingBatch) -> TrainingBatch:
    return batch


def table(folder: Path, name: str, rows: int) -> ExampleTable:
    lines: list[object] = [
        {"query": f"{name}{i}", "positive": f"{name}p{i}", "negatives": [f"{name}n{i}"] * (i % 2), "scores": None}
        for i in range(rows)
    ]
    return open_source(SourceConfig(str(write_lines(folder / f"{name}.jsonl", lines))), folder / "cache")


@pytest.mark.parametrize("size", [1, 2])
def test_blocks_have_their_own_texts_on_every_rank(tmp_path: Path, size: int) -> None:
    tables = [table(tmp_path, "a", 30), table(tmp_path, "b", 10)]
    found: dict[str, list[str]] = {"a": [], "b": []}
    whole: tuple[list[str], list[str]] | None = None
    for rank in range(size):
        for separate in (True, False):
            data = BatchDataset(
                tables,
                MixedSchedule([30, 10], batch_size=8, seed=1, steps=2),
                as_given,
                prompts=[Prompts("A: ", "AP: "), Prompts("B: ", "BP: ")],
                passages=PassageSettings(negatives=1),
                share=Share(rank, size),
                separate_blocks=separate,
            )
            batch = data.batch(1)
            assert [query[0] for query in batch.queries] == ["A"] * (6 // size) + ["B"] * (2 // size)
            if not separate:
                assert not batch.parts and (batch.false_negatives is None) == (size > 1)
                assert whole == (batch.queries, batch.passages)
                continue
            whole = batch.queries, batch.passages
            assert [part.loss_share for part in batch.parts] == [0.75, 0.25]
            for part, name in zip(batch.parts, "ab", strict=True):
                prefix = name.upper()
                assert all(text.startswith(f"{prefix}P: {name}") for text in part.passages)
                numbers = [int(query.removeprefix(f"{prefix}: {name}")) for query in part.queries]
                assert part.positives == [f"{prefix}P: {name}p{i}" for i in numbers]
                assert part.negatives == [f"{prefix}P: {name}n{i}" for i in numbers if i % 2]
                assert (part.false_negatives is None) == (size > 1) == (part.keys is not None)
                found[name] += part.queries
    rows = MixedSchedule([30, 10], batch_size=8, seed=1, steps=2).blocks(1)
    for name, (_, expected) in zip("ab", rows, strict=True):
        assert found[name] == [f"{name.upper()}: {name}{row}" for row in expected]


def test_the_loss_of_blocks_is_that_of_a_masked_matrix() -> None:
    torch.manual_seed(0)
    query = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    passage = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    parts = (
        PreparedBatch((), 4, None, passages=6, loss_share=4 / 7),
        PreparedBatch((), 3, None, passages=4, loss_share=3 / 7),
    )
    loss = sum(
        (
            inf_cl_loss(q, p, logit_scale=2.0, implementation="full") * part.loss_share
            for part, q, p in PreparedBatch((), 7, None, parts=parts).split(query, passage)
        ),
        torch.zeros(()),
    )
    scores = 2 * query @ passage.T
    inside = torch.block_diag(torch.ones(4, 6), torch.ones(3, 4)).bool()
    targets = torch.tensor([0, 1, 2, 3, 6, 7, 8])
    expected = torch.nn.functional.cross_entropy(scores.masked_fill(~inside, -torch.inf), targets)
    torch.testing.assert_close(loss, expected)
    for own, other in zip(
        torch.autograd.grad(loss, (query, passage)), torch.autograd.grad(expected, (query, passage)), strict=True
    ):
        torch.testing.assert_close(own, other)


def test_a_run_trains_on_blocks(tiny: ModelConfig, tmp_path: Path) -> None:
    rows = [{"query": word, "positive": text} for word, text in MEANINGS.items()]
    sources = tuple(
        SourceConfig(str(write_lines(tmp_path / f"{name}.jsonl", [*some])))
        for name, some in (("many", rows[:14]), ("few", rows[14:]))
    )
    config = TrainConfig(
        out=str(tmp_path / "run"),
        model=tiny,
        data=DataConfig(sources=sources, workers=0, mix="blocks"),
        optim=OptimConfig(lr=1e-3),
        batch_size=8,
        steps=3,
        log_every=1,
        precision="fp32",
    )
    losses = {}
    for mix in ("blocks", "pool"):
        out = tmp_path / mix
        data = replace(config.data, mix=mix)  # type: ignore[arg-type]
        Trainer.start(replace(config, out=str(out), data=data), Reporter()).train()
        losses[mix] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    # With fewer negatives, the loss is lower.
    assert losses["blocks"][0] < losses["pool"][0]
    for changed, message in (
        ({"temperature": 0.0}, "data.temperature: expected a positive number"),
        ({"temperature": 2.0, "sources": (replace(sources[0], weight=1.0),)}, "expected 1 with weights"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config.data, **changed)  # type: ignore[arg-type]
