"""Which options of `inf_cl_loss` combine: the one place that refuses pairs of them."""

from __future__ import annotations

from losses.options import Negatives, Positives

MASKED = ("positives", "negatives.limit", "negatives.guide", "negatives.hardness", "statistics")

# Two groups of options, and why no option of the first goes with one of the second.
REFUSED: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        ("negatives.hardness",),
        ("negatives.own", "negatives.frozen"),
        "its weights are those of the passages of the batch",
    ),
    (
        MASKED,
        ("negatives.same_side",),
        "a single partition function has no row of its own, of which negatives are masked, weighted or counted",
    ),
)


def check_combination(positives: Positives | None, negatives: Negatives | None, statistics: bool) -> None:
    """Check that the given options combine.

    Raises:
        ValueError: If two do not. The message begins with the name of one, and has the name of the other and a reason.
    """
    given = given_options(positives, negatives, statistics)
    for some, others, reason in REFUSED:
        for one in some:
            for other in others:
                if one in given and other in given:
                    raise ValueError(f"{one} does not combine with {other}: {reason}")


def given_options(positives: Positives | None, negatives: Negatives | None, statistics: bool) -> set[str]:
    """Names of the options that are given."""
    values = {"positives": positives is not None, "statistics": statistics is True}
    if isinstance(negatives, Negatives):
        for name in ("limit", "guide", "own", "frozen"):
            values[f"negatives.{name}"] = getattr(negatives, name) is not None
        values["negatives.hardness"] = negatives.hardness != 0
        values["negatives.same_side"] = negatives.same_side is True
    return {name for name, value in values.items() if value}
