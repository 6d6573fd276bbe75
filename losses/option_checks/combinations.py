"""Which options of `inf_cl_loss` combine: the one place that refuses pairs of them."""

from __future__ import annotations

from typing import Any

from losses.options import Negatives, TeacherScores

# What needs sums over negatives alone (losses/masked), and what adds terms to the row sums (losses/negatives).
MASKED = ("positives", "negatives.limit", "negatives.guide", "negatives.hardness", "statistics")
OUTSIDE = ("negatives.own", "negatives.frozen", "negatives.same_side")

# Two groups of options, and why no option of the first goes with one of the second.
REFUSED: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        MASKED[:-1],
        ("negatives.same_side",),
        "a single partition function sums over queries and passages, not over the negatives of a row",
    ),
    (
        ("teacher",),
        (*MASKED[:-1], *OUTSIDE),
        "its divergence compares the scores of all passages of the batch, which these options change",
    ),
)
# Statistics have kernels of the whole matrix.
NOT_DENSE = (*MASKED[:-1], *OUTSIDE, "matryoshka", "teacher", "teacher.scores")


def check_combination(
    positives: Any, negatives: Any, statistics: Any, matryoshka: Any, teacher: Any, implementation: str
) -> None:
    """Check that the given options combine with each other and with the implementation.

    Raises:
        ValueError: If two do not. The message begins with the name of one and has the name of the other.
    """
    given = given_options(positives, negatives, statistics, matryoshka, teacher)
    for some, others, reason in REFUSED:
        for one in some:
            for other in others:
                if one in given and other in given:
                    raise ValueError(f"{one} does not combine with {other}: {reason}")
    missing = [name for name in NOT_DENSE if name in given]
    if implementation == "dense" and missing:
        raise ValueError(f"implementation 'dense' does not support {missing[0]}: use 'auto'")


def given_options(
    positives: Any, negatives: Any, statistics: Any, matryoshka: Any = None, teacher: Any = None
) -> set[str]:
    """Names of the options that are given; "teacher.scores" for a `TeacherScores`."""
    values = {"positives": positives, "matryoshka": matryoshka}
    values["teacher.scores" if isinstance(teacher, TeacherScores) else "teacher"] = teacher
    if isinstance(negatives, Negatives):
        values |= {f"negatives.{name}": getattr(negatives, name) for name in ("limit", "guide", "own", "frozen")}
    given = {name for name, value in values.items() if value is not None}
    if isinstance(negatives, Negatives):
        switches = {"negatives.hardness": negatives.hardness, "negatives.same_side": negatives.same_side}
        given |= {name for name, value in switches.items() if value}
    return given | {"statistics"} if statistics is True else given
