"""Is a difference between two systems more than chance? Paired tests over queries, and their correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERMUTATIONS = 100_000
# Signs drawn at once: small enough for a few tens of MB, large enough that the matrix product is what takes the time.
BLOCK_SIGNS = 4_000_000


@dataclass(frozen=True)
class PairedTest:
    """Two systems on the same queries."""

    difference: float
    """Mean of b − a over the queries."""
    low: float
    high: float
    """The 95 % confidence interval of that mean, by Student's t."""
    wins: int
    losses: int
    ties: int
    """Queries on which b is better, worse, the same."""
    t: float
    """Student's statistic; infinite where every query differs by the same amount."""
    p_t: float
    """Two-sided p-value of the paired t-test."""
    p_randomisation: float
    """Two-sided p-value of the paired randomisation test."""


def paired_test(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> PairedTest:
    """Compare two systems by a measure's values on the same queries [Q] each.

    The paired t-test is scipy's. The two agree on most retrieval measures (Smucker, Allan and Carterette, CIKM 2007);
    where they do not, the randomisation test assumes less.

    Raises:
        ValueError: fewer than two queries, different lengths, values that are not finite, or `permutations` below 1.
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
        # Without spread the t statistic is 0/0 or ∞, and scipy warns.
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
        p_randomisation=randomisation_test(difference, permutations=permutations, seed=seed),
    )


def randomisation_test(difference: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Two-sided p-value of the paired randomisation test (Fisher 1935): by chance alone, any sign could be the other.

    The statistic is the absolute mean. With at most `permutations` sign patterns all of them are counted, and the
    p-value is exact; otherwise so many are drawn, and p = (hits + 1) / (draws + 1), which is never 0 and never too
    small on average (Phipson and Smyth 2010). Queries without a difference have no sign and are left out.

    Args:
        difference: b − a by query, [Q].
        permutations: patterns counted or drawn.
        seed: of the draws (numpy's PCG64); the same seed gives the same p-value.

    Raises:
        ValueError: `permutations` is below 1.
    """
    if permutations < 1:
        raise ValueError(f"permutations: expected at least 1, found {permutations}")
    values = difference[difference != 0].astype(np.float64)
    if not len(values):
        return 1.0
    # Sums of the same values in another order differ in their last digits; those are ties, and ties count.
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
    """p-values corrected for their number, in the order given (Holm 1979): the chance of any false alarm stays below α.

    The smallest is multiplied by n, the next by n − 1, …; none falls below an earlier one, none exceeds 1.
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
