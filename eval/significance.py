"""Paired significance tests over queries, and Holm's correction for multiple comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERMUTATIONS = 100_000
# Random signs per block: a few tens of MB, and large enough that the matrix product dominates the time.
BLOCK_SIGNS = 4_000_000


@dataclass(frozen=True)
class PairedTest:
    """The result of the paired tests of system b against system a."""

    difference: float
    """Mean of b − a over the queries."""
    low: float
    high: float
    """95 % confidence interval of that mean, by Student's t."""
    wins: int
    losses: int
    ties: int
    """Number of queries on which b is better, worse, equal."""
    t: float
    """Student's t statistic; infinite if all queries differ by the same nonzero amount."""
    p_t: float
    """Two-sided p-value of the paired t-test."""
    p_randomisation: float
    """Two-sided p-value of the paired randomization test."""


def paired_test(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> PairedTest:
    """Run the paired t-test (scipy) and the paired randomization test on the values of two systems.

    The two tests agree on most retrieval measures (Smucker, Allan and Carterette, CIKM 2007); the randomization test
    makes fewer assumptions.

    Args:
        a: values of system a by query, [Q].
        b: values of system b on the same queries, [Q].
        permutations: see `randomization_test`.
        seed: see `randomization_test`.

    Raises:
        ValueError: there are fewer than two queries, the lengths differ, a value is not finite, or `permutations` is
            below 1.
    """
    from scipy import stats

    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(f"expected two rows of equal length, at least 2, found {first.shape} and {second.shape}")
    difference = second - first
    if not np.isfinite(difference).all():
        raise ValueError("expected finite values, found NaN or infinity")
    mean = float(difference.mean())
    if np.ptp(difference) == 0:
        # With zero variance the t statistic is 0/0 or infinite, and scipy warns.
        t, p_t, low, high = (0.0, 1.0, 0.0, 0.0) if mean == 0 else (math.copysign(math.inf, mean), 0.0, mean, mean)
    else:
        found = stats.ttest_1samp(difference, 0.0)
        interval = found.confidence_interval(0.95)
        t, p_t, low, high = (float(x) for x in (found.statistic, found.pvalue, interval.low, interval.high))
    return PairedTest(
        difference=mean,
        low=low,
        high=high,
        wins=int((difference > 0).sum()),
        losses=int((difference < 0).sum()),
        ties=int((difference == 0).sum()),
        t=t,
        p_t=p_t,
        p_randomisation=randomization_test(difference, permutations=permutations, seed=seed),
    )


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of the mean of a measure over queries, by Student's t.

    Args:
        values: value of each query, [Q].

    Raises:
        ValueError: there are fewer than two queries, or a value is not finite.
    """
    from scipy import stats

    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        raise ValueError(f"values: expected at least 2 finite values, found {sample.shape}")
    half = float(stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
    return float(sample.mean()) - half, float(sample.mean()) + half


def randomization_test(difference: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Two-sided p-value of the paired randomization test (Fisher 1935), which flips the signs of the differences.

    The statistic is the absolute mean difference. If there are at most `permutations` sign patterns, all of them are
    enumerated and the p-value is exact. Otherwise `permutations` random patterns are drawn and p = (hits + 1) /
    (draws + 1), which is never 0 and does not underestimate p on average (Phipson and Smyth 2010). Queries without a
    difference are ignored.

    Args:
        difference: b − a by query, [Q].
        permutations: maximum number of sign patterns, enumerated or drawn.
        seed: seed of numpy's PCG64; the same seed gives the same p-value.

    Raises:
        ValueError: `permutations` is below 1.
    """
    if permutations < 1:
        raise ValueError(f"permutations: expected at least 1, found {permutations}")
    values = difference[difference != 0].astype(np.float64)
    if not len(values):
        return 1.0
    # Tolerance for rounding: sums of the same values in another order are ties, and ties count as hits.
    threshold = abs(values.sum()) - 1e-12 * np.abs(values).sum()
    count = len(values)
    exact = count < 63 and 2**count <= permutations
    block = max(1, BLOCK_SIGNS // count)
    total = 2**count if exact else permutations
    generator = np.random.default_rng(seed)
    hits = 0
    flipped: np.ndarray
    for start in range(0, total, block):
        rows = min(block, total - start)
        if exact:
            flipped = (np.arange(start, start + rows)[:, None] >> np.arange(count)) & 1
        else:
            drawn = np.frombuffer(generator.bytes(rows * -(-count // 8)), dtype=np.uint8).reshape(rows, -1)
            flipped = np.unpackbits(drawn, axis=1, count=count)
        sums = values.sum() - 2 * (flipped.astype(np.float64) @ values)
        hits += int((np.abs(sums) >= threshold).sum())
    return hits / total if exact else (hits + 1) / (total + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of n p-values, in the given order (Holm 1979); controls the family-wise error rate.

    The smallest p-value is multiplied by n, the next by n − 1, and so on. Corrected values are monotone and at most 1.
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        corrected[position] = largest
    return corrected
