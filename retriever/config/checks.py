"""Checks that several sections of the configuration share."""

from __future__ import annotations

import math


def check_at_least(config: object, prefix: str, minimum: int, *names: str) -> None:
    """Raise a ValueError that names the field if a field of `config` is neither None nor at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{prefix}{name}: expected at least {minimum}, found {value}")


def is_positive(value: float) -> bool:
    """Return whether a number is over 0 and finite."""
    return 0 < value < math.inf
