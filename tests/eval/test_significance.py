"""Paired tests equal scipy and enumerated cases, hold their level under the null, and are reproducible."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from eval import significance
from eval.significance import holm, paired_test, randomization_test


def test_exact_p_equals_the_enumeration_of_sign_patterns() -> None:
    difference = np.array([0.5, 0.25, -0.125, 0.0, 1.0])
    nonzero = difference[difference != 0]
    observed = abs(nonzero.sum())
    sums = [abs(float(np.dot(signs, nonzero))) for signs in product((1, -1), repeat=4)]
    assert randomization_test(difference) == sum(s >= observed for s in sums) / 16
    # All differences have one sign: only that pattern and its negation are as extreme.
    assert randomization_test(np.array([0.1, 0.2, 0.3])) == 2 / 8


def test_exact_p_equals_scipy() -> None:
    difference = np.random.default_rng(3).normal(0.3, 1, size=13)
    theirs = stats.permutation_test(
        (difference,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert randomization_test(difference) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_sampled_p_equals_scipy_within_sampling_error() -> None:
    difference = np.random.default_rng(5).normal(0.15, 1, size=150)
    theirs = stats.permutation_test(
        (difference,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        batch=2_000,
        vectorized=True,
        rng=np.random.default_rng(1),
    ).pvalue
    ours = randomization_test(difference, permutations=20_000)
    error = math.sqrt(theirs * (1 - theirs) / 20_000)
    assert 0.02 < theirs < 0.5 and abs(ours - theirs) < 5 * math.sqrt(2) * error


def test_sampled_p_approaches_the_exact_p() -> None:
    difference = np.random.default_rng(7).normal(0.4, 1, size=15)
    exact = randomization_test(difference, permutations=2**15)
    assert randomization_test(difference, permutations=2**15 - 1) == pytest.approx(exact, abs=0.01)


def test_sums_that_differ_by_rounding_are_ties() -> None:
    # 0.1 + 0.2 - 0.3 is not 0 in binary; all eight patterns of ±(0.1, 0.2, 0.3) are at least as extreme as a sum of 0.
    assert randomization_test(np.array([0.1, 0.2, -0.3])) == 1.0


def test_p_is_never_zero_and_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    difference = np.full(500, 0.25) + np.linspace(0, 0.1, 500)
    assert randomization_test(difference, permutations=999) == 1 / 1000
    noise = np.random.default_rng(0).normal(0.05, 1, size=64)
    whole = randomization_test(noise, permutations=5000, seed=4)
    monkeypatch.setattr(significance, "BLOCK_SIGNS", 64 * 7)
    assert randomization_test(noise, permutations=5000, seed=4) == whole
    assert randomization_test(noise, permutations=5000, seed=5) != whole


def test_the_false_positive_rate_under_the_null_is_alpha() -> None:
    generator = np.random.default_rng(11)
    # Heavy-tailed with many zeros, like differences of nDCG; symmetric, so that the null holds.
    trials = generator.choice([-1.0, 1.0], size=(1000, 40)) * generator.exponential(0.1, size=(1000, 40))
    trials *= generator.random((1000, 40)) < 0.6
    alarms = sum(randomization_test(row, permutations=999, seed=i) <= 0.05 for i, row in enumerate(trials))
    low, high = stats.binom.interval(0.999, 1000, 0.05)
    assert low <= alarms <= high


def test_holm_controls_the_family_wise_error_rate() -> None:
    generator = np.random.default_rng(13)
    families = [
        [randomization_test(generator.normal(size=12), permutations=4096) for _ in range(6)] for _ in range(150)
    ]
    alarms = sum(min(holm(family)) <= 0.05 for family in families)
    raw = sum(min(family) <= 0.05 for family in families)
    assert alarms <= 16 < raw


def test_t_test_and_interval_equal_scipy_and_counts_are_correct() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.random(60), generator.random(60)
    b[:10] = a[:10]
    ours, theirs = paired_test(a, b), stats.ttest_rel(b, a)
    assert (ours.t, ours.p_t) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-12)
    assert (ours.wins, ours.losses, ours.ties) == ((b > a).sum(), (b < a).sum(), 10)
    assert ours.difference == pytest.approx(b.mean() - a.mean())
    mirrored = paired_test(b, a)
    assert (mirrored.wins, mirrored.losses, mirrored.p_randomisation) == (ours.losses, ours.wins, ours.p_randomisation)


def test_zero_and_constant_differences_are_defined() -> None:
    same = paired_test([0.5, 0.25, 1.0], [0.5, 0.25, 1.0])
    assert (same.p_t, same.p_randomisation, same.t, same.ties) == (1.0, 1.0, 0.0, 3)
    shifted = paired_test([0.0, 0.0, 0.0], [0.5, 0.5, 0.5])
    assert (shifted.p_t, shifted.p_randomisation, shifted.t) == (0.0, 0.25, math.inf)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bad_input_is_refused() -> None:
    for a, b in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, math.nan], [1.0, 1.0])):
        with pytest.raises(ValueError, match="expected"):
            paired_test(a, b)
    with pytest.raises(ValueError, match="permutations: expected at least 1"):
        randomization_test(np.array([1.0]), permutations=0)
