"""The schedule is a function of seed and step; rows occur once per epoch and at most once per batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.files import InputError
from retriever.data.schedules.schedule import BatchSchedule


def walk(schedule: BatchSchedule, source: int) -> np.ndarray:
    """Return all rows of one source in the order of the steps."""
    return np.concatenate([rows for found, rows in map(schedule.rows, range(len(schedule))) if found == source])


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 60), share=st.floats(0.01, 1.0), epochs=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_rows_occur_once_per_epoch_and_at_most_once_per_batch(size: int, share: float, epochs: int, seed: int) -> None:
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
def test_rows_of_a_step_do_not_depend_on_earlier_calls(sizes: list[int]) -> None:
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
        # Two random orders agree in one position on average.
        assert np.count_nonzero(first[:size] == second[:size]) < 10


def test_rows_of_a_batch_are_spread_over_the_source() -> None:
    first = BatchSchedule([10_000], batch_size=1000, seed=0, steps=1).rows(0)[1]
    assert first.dtype == np.int64
    counts = np.histogram(first, bins=10, range=(0, 10_000))[0]
    assert counts.min() > 60
    assert counts.max() < 140


def test_batches_of_sources_are_proportional_to_weights_in_random_order() -> None:
    schedule = BatchSchedule([50, 500, 100], batch_size=10, seed=3, steps=1000, weights=[1.0, 2.0, 5.0])
    sources = np.array([schedule.rows(step)[0] for step in range(1000)])
    np.testing.assert_array_equal(np.bincount(sources), [125, 250, 625])
    np.testing.assert_allclose(np.bincount(sources[:400]) / 400, [0.125, 0.25, 0.625], atol=0.08)


def test_default_weight_is_the_number_of_rows() -> None:
    schedule = BatchSchedule([300, 100], batch_size=10, seed=0, epochs=1, weights=[None, None])
    assert [len(walk(schedule, source)) for source in (0, 1)] == [300, 100]
    schedule = BatchSchedule([300, 100], batch_size=10, seed=0, steps=40, weights=[None, 300.0])
    assert [len(walk(schedule, source)) for source in (0, 1)] == [200, 200]


def test_a_fraction_of_an_epoch_is_allowed() -> None:
    assert len(BatchSchedule([100], batch_size=10, seed=0, epochs=0.25)) == 2


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=4),
    batch_size=st.integers(2, 30),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_a_source_smaller_than_a_batch_gives_all_its_rows(
    sizes: list[int], batch_size: int, epochs: int, seed: int
) -> None:
    def plan() -> BatchSchedule:
        return BatchSchedule(sizes, batch_size=batch_size, seed=seed, epochs=epochs)

    schedule, most = plan(), 0
    for step in range(len(schedule)):
        source, rows = schedule.rows(step)
        most = max(most, len(rows))
        assert len(set(rows.tolist())) == len(rows) == schedule.batch_rows(source) == min(batch_size, sizes[source])
        found, again = plan().rows(step)
        assert found == source and np.array_equal(again, rows), "a step depends on earlier calls"
    assert len(schedule.rows(schedule.largest_step)[1]) == most
    visits = [sum(schedule.rows(step)[0] == source for step in range(len(schedule))) for source in range(len(sizes))]
    for size, count in zip(sizes, visits, strict=True):
        # Once per epoch, up to the rounding of the number of batches.
        assert abs(count - epochs * max(size, batch_size) / batch_size) < 2


def test_the_order_of_small_sources_differs_between_batches() -> None:
    schedule = BatchSchedule([200, 40], batch_size=50, seed=0, epochs=8)
    orders = [rows.tolist() for found, rows in map(schedule.rows, range(len(schedule))) if found == 1]
    assert len(orders) > 2 and len({tuple(order) for order in orders}) == len(orders)


def test_a_single_source_must_fill_a_batch() -> None:
    with pytest.raises(InputError, match=r"^few\.jsonl: expected at least 64 rows \(batch_size\), found 63$"):
        BatchSchedule([63], batch_size=64, seed=0, epochs=1, names=["few.jsonl"])


@pytest.mark.parametrize(
    ("size", "processes", "least"), [(1, 1, "2 rows"), (3, 4, "4 rows, one for each of 4 processes")]
)
def test_a_source_needs_a_row_per_process_and_at_least_two(size: int, processes: int, least: str) -> None:
    with pytest.raises(InputError, match=rf"^few\.jsonl: expected at least {least}, found {size}$"):
        names = ["many.jsonl", "few.jsonl"]
        BatchSchedule([100, size], batch_size=64, seed=0, epochs=1, names=names, processes=processes)
    assert len(BatchSchedule([100, size + 1], batch_size=64, seed=0, epochs=1, processes=processes)) == 2


def test_describe_gives_the_share_of_each_source() -> None:
    names = ["many.jsonl", "few.jsonl"]
    schedule = BatchSchedule([600, 50], batch_size=100, seed=0, epochs=2, names=names)
    assert schedule.describe() == [
        "many.jsonl: 12 of 14 batches (85.7%)",
        "few.jsonl: 2 of 14 batches (14.3%) of 50 rows, the whole source",
    ]
    mixed = BatchSchedule([600, 200], batch_size=100, seed=0, steps=10, names=names, weights=[1.0, None])
    assert mixed.describe() == [
        "many.jsonl: 0 of 10 batches (0.0%)",
        "few.jsonl: 10 of 10 batches (100.0%)",
        "weights are set for many.jsonl; other sources are weighted by their rows",
    ]
    assert BatchSchedule([600], batch_size=100, seed=0, epochs=1, names=names[:1]).describe() == []


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
def test_an_invalid_argument_is_named(settings: dict, field: str) -> None:
    arguments = {"sizes": [10], "batch_size": 5, "seed": 0, "epochs": 1, **settings}
    with pytest.raises(ValueError, match=f"^{field}: "):
        BatchSchedule(**arguments)


def test_a_step_outside_the_schedule_is_an_index_error() -> None:
    schedule = BatchSchedule([10], batch_size=5, seed=0, steps=3)
    for step in (-1, 3):
        with pytest.raises(IndexError):
            schedule.rows(step)
