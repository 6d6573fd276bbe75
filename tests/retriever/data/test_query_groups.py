"""Groups are connected components, and sets have the requested sizes and depend only on texts and seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever.data.known_positives import text_digests
from retriever.data.splitting.query_groups import (
    DEV,
    TEST,
    TRAIN,
    check_size,
    choose_splits,
    connected_groups,
    is_large_enough,
    resolve_size,
)
from retriever.errors import ConfigError


def texts(count: int) -> np.ndarray:
    return np.sort(text_digests(f"query {n}" for n in range(count)).view(np.uint64))


@settings(max_examples=100, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 12), st.integers(8, 20)), min_size=1))
def test_groups_are_connected_components_of_pairs(pairs: set[tuple[int, int]]) -> None:
    queries = np.unique([query for query, _ in pairs]).astype(np.uint64)
    of_query = np.searchsorted(queries, np.array([query for query, _ in pairs], np.uint64))
    groups = connected_groups(queries, of_query, np.array([passage for _, passage in pairs], np.uint64))
    reached = {number: {number} for pair in pairs for number in pair}
    for _ in reached:
        for one, other in pairs:
            reached[one] = reached[other] = reached[one] | reached[other]
    for number in list(reached):
        for each in reached[number]:
            reached[each] = reached[each] | reached[number]
    for one, group in zip(queries.tolist(), groups.tolist(), strict=True):
        for other, its in zip(queries.tolist(), groups.tolist(), strict=True):
            assert (group == its) == (other in reached[one])
    assert sorted(set(groups.tolist())) == list(range(groups.max() + 1))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=60),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 2**70),
)
def test_sets_of_undivided_groups_have_at_most_twice_the_size(sizes: list[int], dev: int, test: int, seed: int) -> None:
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    splits = choose_splits(groups, texts(len(groups)), dev, test, seed)
    for group in range(len(sizes)):
        assert len(set(splits[groups == group].tolist())) == 1
    counts = np.bincount(splits, minlength=3)
    for split, wanted in ((DEV, dev), (TEST, test)):
        assert counts[split] <= 2 * wanted
        spare = [size for group, size in enumerate(sizes) if splits[groups == group][0] == TRAIN]
        # The remaining groups do not fit.
        assert all(counts[split] + size > wanted for size in spare)


@pytest.mark.parametrize(("dev", "test"), [(0, 0), (1, 1), (7, 100), (499, 500)])
def test_single_queries_give_exactly_the_requested_sizes(dev: int, test: int) -> None:
    splits = choose_splits(np.arange(1000), texts(1000), dev, test, 0)
    assert np.bincount(splits, minlength=3).tolist() == [1000 - dev - test, dev, test]


def test_a_large_group_is_drawn_only_if_small_ones_do_not_fill_a_set() -> None:
    groups = np.concatenate([np.zeros(40, int), np.arange(1, 201)])
    for seed in range(20):
        splits = choose_splits(groups, texts(240), 50, 50, seed)
        assert np.bincount(splits).tolist() == [140, 50, 50] and splits[0] == TRAIN


def test_the_draw_is_platform_independent_and_depends_on_the_seed() -> None:
    queries = texts(50)
    drawn = [np.flatnonzero(choose_splits(np.arange(50), queries, 2, 3, seed) == TEST).tolist() for seed in (0, 1, -1)]
    assert drawn == [[5, 11, 46], [8, 20, 49], [1, 33, 38]]


def test_the_test_set_does_not_depend_on_the_dev_set() -> None:
    groups = np.arange(300) // 3
    one, other = (choose_splits(groups, texts(300), dev, 30, 5) for dev in (3, 90))
    assert ((one == TEST) == (other == TEST)).all() and (one != other).any()


@pytest.mark.parametrize(
    ("size", "queries", "found"),
    [
        (None, 3, 1),
        (None, 39, 1),
        (None, 40, 2),
        (None, 20_000, 1000),
        (None, 10**9, 1000),
        (0, 10, 0),
        (17, 10, 17),
        (np.int64(17), 10, 17),
        (0.29, 100, 29),
        (0.001, 10, 1),
        (0.5, 7, 3),
    ],
)
def test_a_size_is_a_number_or_a_fraction(size: float | None, queries: int, found: int) -> None:
    check_size("dev", size)
    assert resolve_size(size, queries) == found


@pytest.mark.parametrize("size", [-1, 1.0, 1.5, -0.1, 0.0, float("nan"), float("inf"), True, "3"])
def test_invalid_sizes_are_refused_by_name(size: object) -> None:
    with pytest.raises(ConfigError, match=r"--dev: expected a whole number of queries, or a share .* found"):
        check_size("--dev", size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "requested", "expected"), [(0, 0, True), (0, 1, False), (1, 2, True), (49, 100, False)]
)
def test_half_of_the_requested_size_is_enough(count: int, requested: int, expected: bool) -> None:
    assert is_large_enough(count, requested) is expected
