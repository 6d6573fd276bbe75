"""Detection of loss spikes by the median and the median absolute deviation of the recent losses."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

WINDOW = 64
"""Number of losses that a new one is compared with."""
MIN_LOSSES = 16
"""Number of losses before which none counts as a spike: losses fall quickly at the start."""
DEVIATIONS = 10.0
"""Standard deviations above the median, estimated as 1.4826 times the median absolute deviation."""
MIN_FACTOR = 1.5
"""Smallest ratio of a spike to the median, for losses that hardly vary."""
MAX_IN_A_ROW = 10
"""Number of consecutive spikes after which the loss has not spiked but risen."""


class LossSpikes:
    """The recent losses of a run, without its spikes.

    The median does not move with a spike, as a mean would.

    Args:
        losses: the recent losses, for a run that is resumed. Default: none.
    """

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self._losses = deque(losses, maxlen=WINDOW)
        self.in_a_row = 0
        """Number of spikes since the last other loss."""

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses, the oldest first."""
        return tuple(self._losses)

    @property
    def median(self) -> float:
        """Median of the losses; NaN if there are none."""
        return statistics.median(self._losses) if self._losses else float("nan")

    def add(self, loss: float) -> bool:
        """Add a loss. Returns whether it is a spike; a spike is counted, but is not compared with later ones."""
        if self._is_spike(loss):
            self.in_a_row += 1
            return True
        self.in_a_row = 0
        if math.isfinite(loss):
            self._losses.append(loss)
        return False

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < MIN_LOSSES:
            return False
        median = self.median
        deviation = 1.4826 * statistics.median(abs(other - median) for other in self._losses)
        return loss > max(median + DEVIATIONS * deviation, MIN_FACTOR * median)
