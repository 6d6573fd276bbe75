"""Batches do not depend on the process that prepares them."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retriever.config.sources import SourceConfig
from retriever.data.batches import BatchDataset, Prompts, TrainingBatch, batch_loader
from retriever.data.passage_choice import PassageSettings
from retriever.data.schedules.schedule import BatchSchedule
from retriever.data.table import ExampleTable, open_source
from retriever.distributed.share import Share


def as_given(batch: TrainingBatch) -> TrainingBatch:
    return batch


def table(folder: Path, name: str, rows: int) -> ExampleTable:
    path = folder / f"{name}.jsonl"
    lines = (
        {
            "query": f"{name} {i}",
            "positive": [f"{name} p{i}-{j}" for j in range(1 + i % 3)],
            "negatives": [f"{name} n{i}-{j}" for j in range(i % 5)],
        }
        for i in range(rows)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_source(SourceConfig(str(path)), folder / "cache")


def dataset(
    folder: Path, *, seed: int = 0, epochs: int = 2, negatives_per_query: int = 2, share: Share | None = None
) -> BatchDataset[TrainingBatch]:
    tables = [table(folder, "a", 50), table(folder, "b", 23)]
    schedule = BatchSchedule([len(t) for t in tables], batch_size=8, seed=seed, epochs=epochs)
    prompts = [Prompts("query: ", "passage: "), Prompts()]
    return BatchDataset(
        tables,
        schedule,
        as_given,
        prompts=prompts,
        passages=PassageSettings(negatives=negatives_per_query),
        share=share,
    )


def assert_equal(found: list[TrainingBatch], expected: list[TrainingBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.source, one.queries, one.passages) == (other.source, other.queries, other.passages)
        assert one.false_negatives is not None and other.false_negatives is not None
        for name in ("query_ids", "passage_ids", "excluded"):
            np.testing.assert_array_equal(getattr(one.false_negatives, name), getattr(other.false_negatives, name))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path, workers: int) -> None:
    data = dataset(tmp_path)
    assert_equal(list(batch_loader(data, workers=workers)), [data.batch(step) for step in range(len(data))])


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_equals_skipping_to_it(tmp_path: Path, workers: int) -> None:
    whole = list(batch_loader(dataset(tmp_path)))
    assert_equal(list(batch_loader(dataset(tmp_path), start=5, workers=workers)), whole[5:])
    assert_equal(list(batch_loader(dataset(tmp_path), start=5, stop=7, workers=workers)), whole[5:7])


def test_loading_does_not_change_global_random_states(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for workers in (0, 1):
        assert len(list(batch_loader(data, workers=workers))) == len(data)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_a_dataset_can_be_pickled_to_a_spawned_process(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    assert_equal([pickle.loads(pickle.dumps(data)).batch(3)], [data.batch(3)])  # noqa: S301


def test_a_batch_has_the_texts_of_each_query_with_prompts(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    for step in range(len(data)):
        batch = data.batch(step)
        name, query_prompt, passage_prompt = [("a", "query: ", "passage: "), ("b", "", "")][batch.source]
        numbers = [int(text.removeprefix(f"{query_prompt}{name} ")) for text in batch.queries]
        for number, positive in zip(numbers, batch.positives, strict=True):
            assert positive.startswith(f"{passage_prompt}{name} p{number}-")
        expected = [number for number in numbers for _ in range(min(2, number % 5))]
        assert len(set(batch.negatives)) == len(batch.negatives) == len(expected)
        for number, negative in zip(expected, batch.negatives, strict=True):
            assert negative.startswith(f"{passage_prompt}{name} n{number}-")
        assert batch.false_negatives is not None
        assert len(batch.false_negatives.query_ids) == len(batch.queries)
        assert len(batch.false_negatives.passage_ids) == len(batch.passages)


def test_positives_and_negatives_of_a_row_vary_with_the_step(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"query": "q", "positive": ["a", "b", "c"], "negatives": ["u", "v", "w", "x"]}')
    data = BatchDataset(
        [open_source(SourceConfig(str(path)), tmp_path / "cache")],
        BatchSchedule([1], batch_size=1, seed=0, epochs=40),
        as_given,
        passages=PassageSettings(negatives=2),
    )
    batches = [data.batch(step) for step in range(40)]
    assert {text for batch in batches for text in batch.positives} == {"a", "b", "c"}
    assert {text for batch in batches for text in batch.negatives} == {"u", "v", "w", "x"}
    assert all(len(set(batch.negatives)) == 2 for batch in batches)


def test_batches_depend_on_the_seed(tmp_path: Path) -> None:
    assert dataset(tmp_path, seed=1).batch(0).queries != dataset(tmp_path, seed=2).batch(0).queries


def test_there_are_no_negatives_by_default(tmp_path: Path) -> None:
    assert dataset(tmp_path, negatives_per_query=0).batch(0).negatives == []


@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_of_all_ranks_form_the_batch_of_one_process(tmp_path: Path, size: int) -> None:
    whole = dataset(tmp_path)
    shares = [dataset(tmp_path, share=Share(rank, size)) for rank in range(size)]
    for step in range(len(whole)):
        parts, batch = [share.batch(step) for share in shares], whole.batch(step)
        for kind in ("queries", "positives", "negatives"):
            assert [text for part in parts for text in getattr(part, kind)] == getattr(batch, kind)
        assert max(len(part.queries) for part in parts) - min(len(part.queries) for part in parts) <= 1


def test_an_invalid_argument_is_named(tmp_path: Path) -> None:
    schedule = BatchSchedule([10], batch_size=5, seed=0, steps=1)
    with pytest.raises(ValueError, match=r"^prompts: "):
        BatchDataset([table(tmp_path, "a", 10)], schedule, as_given, prompts=[])
    for name, value in (("negatives", -1), ("max_positives", 0)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            PassageSettings(**{name: value})


@pytest.mark.parametrize("positives", ["draw", "all"])
@pytest.mark.parametrize("size", [1, 3])
def test_teacher_scores_point_at_their_passages_and_rows_have_prompts(
    tmp_path: Path, size: int, positives: Any
) -> None:
    path = tmp_path / "scored.jsonl"
    rows = []
    for i in range(16):
        positives = [f"{i} p{j}" for j in range(1 + i % 2)]
        negatives = [f"{i} n{j}" for j in range(i % 4)]
        scores = [len(text) + 10 * i + int(text[-1]) for text in positives + negatives]
        rows.append({"query": str(i), "positive": positives, "negatives": negatives, "at": f"{i}: ", "scores": scores})
    rows[5]["scores"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SourceConfig(str(path), passage_prompt_column="at")
    tables = [open_source(config, tmp_path / "cache")]
    schedule = BatchSchedule([16], batch_size=16, seed=0, epochs=1)
    settings = PassageSettings(negatives=2, positives=positives)
    for rank in range(size):
        share = Share(rank, size)
        batch = BatchDataset(tables, schedule, as_given, passages=settings, share=share).batch(0)
        assert batch.teacher is not None
        teacher = batch.teacher.shifted(100)
        assert teacher.offsets.tolist()[0] == 0 and len(teacher.offsets) == len(batch.queries) + 1
        for number, query in enumerate(batch.queries):
            listed = slice(*teacher.offsets[number : number + 2])
            texts = [batch.passages[row - 100] for row in teacher.passages[listed]]
            if query == "5":
                assert texts == []
                continue
            drawn = 1 + int(query) % 2 if positives == "all" else 1
            assert texts[0] == batch.positives[number] and len(texts) == drawn + min(2, int(query) % 4)
            assert all(text.startswith(f"{query}: {query} ") for text in texts)
            bare = [text.split(": ")[1] for text in texts]
            assert teacher.scores[listed].tolist() == [len(t) + 10 * int(query) + int(t[-1]) for t in bare]
