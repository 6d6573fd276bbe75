"""Checks that several sections of the configuration share."""

from __future__ import annotations

import math

# Beyond these a value is a mistake that would exhaust memory, processes or the integers of a library.
MAX_COUNT = 2**31 - 1
MAX_LENGTH = 2**20
MAX_WORKERS = 1024
# The order of the batches takes 9 bytes per step.
MAX_STEPS = 100_000_000


def check_at_least(config: object, prefix: str, minimum: int, *names: str, maximum: int = MAX_COUNT) -> None:
    """Raise a ValueError that names the field if a field is neither None nor from `minimum` to `maximum`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{prefix}{name}: expected at least {minimum}, found {shown(value)}")
        if value is not None and value > maximum:
            raise ValueError(f"{prefix}{name}: expected at most {maximum:,}, found {shown(value)}")


def shown(value: float) -> str:
    """Return a number for a message; Python does not write integers of more than 4,300 digits."""
    return str(value) if abs(value) < 2**128 else f"one of {'' if value > 0 else 'minus '}2^128 or more"


def is_positive(value: float) -> bool:
    """Return whether a number is over 0 and finite."""
    return 0 < value < math.inf
