"""Schedule: a pure function of seed and step, every row once an epoch and never twice in a batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.files import InputError
from retriever.data.schedule import BatchSchedule


def walk(schedule: BatchSchedule, source: int) -> np.ndarray:
    """All rows of one source, in the order in which they come."""
    return np.concatenate([rows for found, rows in map(schedule.rows, range(len(schedule))) if found == source])


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 60), share=st.floats(0.01, 1.0), epochs=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_every_epoch_holds_every_row_once_and_no_batch_a_row_twice(
    size: int, share: float, epochs: int, seed: int
) -> None:
    batch_size = max(1, int(size * share))
    schedule = BatchSchedule([size], batch_size=batch_size, seed=seed, epochs=epochs)
    assert len(schedule) == epochs * size // batch_size
    for step in range(len(schedule)):
        assert len(set(schedule.rows(step)[1].tolist())) == batch_size
    order = walk(schedule, 0)
    for epoch in range(len(order) // size):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    rest = order[len(order) // size * size :]
    assert len(set(rest.tolist())) == len(rest)


@pytest.mark.parametrize("sizes", [[5], [6], [9], [10], [11], [23], [7, 30]])
def test_a_step_does_not_depend_on_the_steps_asked_for_before(sizes: list[int]) -> None:
    def plan() -> BatchSchedule:
        return BatchSchedule(sizes, batch_size=5, seed=1, epochs=8)

    forward, backward = plan(), plan()
    in_order = [forward.rows(step) for step in range(len(forward))]
    for step in reversed(range(len(forward))):
        for schedule in (backward, plan()):
            source, rows = schedule.rows(step)
            assert source == in_order[step][0]
            np.testing.assert_array_equal(rows, in_order[step][1])


def test_the_order_differs_by_seed_epoch_and_source() -> None:
    size = 1000
    one = walk(BatchSchedule([size], batch_size=100, seed=1, epochs=2), 0)
    other = walk(BatchSchedule([size], batch_size=100, seed=2, epochs=2), 0)
    both = BatchSchedule([size, size], batch_size=100, seed=1, epochs=1)
    for first, second in [(one, other), (one[:size], one[size:]), (walk(both, 0), walk(both, 1))]:
        # Two random orders agree in one place on average.
        assert np.count_nonzero(first[:size] == second[:size]) < 10


def test_rows_are_spread_over_their_source() -> None:
    first = BatchSchedule([10_000], batch_size=1000, seed=0, steps=1).rows(0)[1]
    assert first.dtype == np.int64
    counts = np.histogram(first, bins=10, range=(0, 10_000))[0]
    assert counts.min() > 60
    assert counts.max() < 140


def test_sources_get_batches_in_proportion_to_their_weights_at_random() -> None:
    schedule = BatchSchedule([50, 500, 100], batch_size=10, seed=3, steps=1000, weights=[1.0, 2.0, 5.0])
    sources = np.array([schedule.rows(step)[0] for step in range(1000)])
    np.testing.assert_array_equal(np.bincount(sources), [125, 250, 625])
    np.testing.assert_allclose(np.bincount(sources[:400]) / 400, [0.125, 0.25, 0.625], atol=0.08)


def test_a_source_without_weight_weighs_its_rows() -> None:
    schedule = BatchSchedule([300, 100], batch_size=10, seed=0, epochs=1, weights=[None, None])
    assert [len(walk(schedule, source)) for source in (0, 1)] == [300, 100]
    schedule = BatchSchedule([300, 100], batch_size=10, seed=0, steps=40, weights=[None, 300.0])
    assert [len(walk(schedule, source)) for source in (0, 1)] == [200, 200]


def test_a_part_of_an_epoch_is_allowed() -> None:
    assert len(BatchSchedule([100], batch_size=10, seed=0, epochs=0.25)) == 2


def test_a_batch_larger_than_a_source_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"^few\.jsonl: expected at least 64 rows, one batch, found 63$"):
        BatchSchedule([100, 63], batch_size=64, seed=0, epochs=1, names=["many.jsonl", "few.jsonl"])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"sizes": []}, "sizes"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"steps": 5}, "epochs, steps"),
        ({"epochs": None}, "epochs, steps"),
        ({"epochs": 0.01}, "epochs, steps"),
        ({"weights": [0.0]}, "weights"),
    ],
)
def test_a_bad_argument_is_named(settings: dict, field: str) -> None:
    arguments = {"sizes": [10], "batch_size": 5, "seed": 0, "epochs": 1, **settings}
    with pytest.raises(ValueError, match=f"^{field}: "):
        BatchSchedule(**arguments)


def test_a_step_outside_the_schedule_is_an_index_error() -> None:
    schedule = BatchSchedule([10], batch_size=5, seed=0, steps=3)
    for step in (-1, 3):
        with pytest.raises(IndexError):
            schedule.rows(step)
