"""`positives`, `negatives` and `statistics`: the reference by the definition, implementations by the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from option_cases import FEATURES, assert_close, assert_same_statistics, case, definition, run

from losses import Guide, InfCLLoss, NegativeLimit, Negatives, Positives, inf_cl_loss


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_follows_the_definition(feature: str) -> None:
    for symmetric, random_positive, masks in itertools.product([False, True], repeat=3):
        given = case(feature, 7, 11, random_positive=random_positive, excluded=masks, ids=masks)
        loss, statistics = inf_cl_loss(**given, logit_scale=6.0, symmetric=symmetric, implementation="full")
        expected, of_rows = definition(given, 6.0, symmetric)
        assert float(loss) == pytest.approx(expected, rel=1e-11)
        assert statistics.rank.tolist() == of_rows["rank"]
        assert statistics.hardest.tolist() == of_rows["hardest"]
        assert statistics.masked.tolist() == of_rows["masked"]
        assert statistics.entropy.tolist() == pytest.approx(of_rows["entropy"], abs=1e-12)
        for i, j in enumerate(of_rows["hardest"]):
            score = 6 * given["query"][i] @ given["passage"][j] if j >= 0 else -torch.inf
            assert float(statistics.hardest_score[i]) == pytest.approx(float(score))
        ranks = of_rows["rank"]
        assert float(statistics.accuracy) == pytest.approx(ranks.count(1) / 7)
        assert float(statistics.mrr) == pytest.approx(sum(1 / rank for rank in ranks) / 7)
        assert float(statistics.masked_share) == pytest.approx(sum(of_rows["masked"]) / 77)


def test_without_options_the_reference_is_the_plain_loss() -> None:
    for symmetric in (False, True):
        given = case("none", 9, 13, excluded=True, ids=True) | {"symmetric": symmetric, "implementation": "full"}
        loss, _ = inf_cl_loss(**given, logit_scale=6.0)
        plain = inf_cl_loss(**{**given, "statistics": False}, logit_scale=6.0)
        torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)


QUERY, PASSAGE = torch.randn(4, 3), torch.randn(6, 3)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("positives must be a Positives, found Tensor", {"positives": torch.zeros(1, 2)}),
        ("positives.pairs must be an integer tensor, found list", {"positives": Positives([[0, 1]])}),  # type: ignore[arg-type]
        (r"positives.pairs must have shape \[pairs, 2\], found \[4\]", {"positives": Positives(torch.arange(4))}),
        (
            r"positives.pairs must hold rows of 4 queries and 6 passages, found \[0, 6\]",
            {"positives": Positives(torch.tensor([[0, 6]]))},
        ),
        (
            r"excluded must not hold a pair of positives, found \[0, 3\]",
            {"positives": Positives(torch.tensor([[1, 2], [0, 3]])), "excluded": torch.tensor([[0, 3]])},
        ),
        ("negatives must be a Negatives, found NegativeLimit", {"negatives": NegativeLimit(1.0)}),
        ("statistics must be True or False, found 1", {"statistics": 1}),
        (
            r"negatives.guide.query must have shape \[4, dimensions\], found \[3, 2\]",
            {"negatives": Negatives(guide=Guide(torch.ones(3, 2), torch.ones(6, 2)))},
        ),
        (
            "negatives.guide.passage has 3 dimensions, negatives.guide.query has 2",
            {"negatives": Negatives(guide=Guide(torch.ones(4, 2), torch.ones(6, 3)))},
        ),
        (
            "negatives.guide.passage must be float32",
            {"negatives": Negatives(guide=Guide(torch.ones(4, 2), torch.ones(6, 2).long()))},
        ),
    ],
)
@pytest.mark.parametrize("loss", [inf_cl_loss, InfCLLoss()])
def test_invalid_options_are_named(loss: Any, message: str, arguments: dict[str, Any]) -> None:
    numbers = {} if isinstance(loss, torch.nn.Module) else {"logit_scale": 1.0}
    with pytest.raises(ValueError, match="^" + message):
        loss(QUERY, PASSAGE, **numbers, **arguments)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("positives.reduction must be one of mean, sum, found 'max'", lambda: Positives(torch.zeros(0, 2), "max")),  # type: ignore[arg-type]
        ("negatives.limit needs a margin or a share", lambda: NegativeLimit()),
        ("negatives.limit.margin must be finite", lambda: NegativeLimit(margin=float("nan"))),
        ("negatives.limit.share must be positive, found 0", lambda: NegativeLimit(share=0)),
        ("negatives.guide.margin must be a number", lambda: Guide(QUERY, PASSAGE, "1")),  # type: ignore[arg-type]
        ("negatives.hardness must not be negative, found -1", lambda: Negatives(hardness=-1)),
        ("negatives.limit must be a NegativeLimit, found float", lambda: Negatives(limit=0.95)),  # type: ignore[arg-type]
    ],
)
def test_invalid_values_of_options_are_named(message: str, make: Any) -> None:
    with pytest.raises(ValueError, match="^" + message):
        make()


SHAPES = [(1, 1), (1, 7), (19, 23), (61, 131)]


def compare(
    feature: str, shape: tuple[int, int], dtype: torch.dtype, allowed: float, scale: float, **options: Any
) -> None:
    """Compare value, gradients and statistics with the reference, for both directions."""
    for symmetric, random_positive in itertools.product([False, True], repeat=2):
        masks = symmetric == random_positive
        given = case(feature, *shape, random_positive=random_positive, excluded=masks, ids=masks)
        given["symmetric"] = symmetric
        truth, of_truth = run(given | {"implementation": "full"}, scale, torch.float64)
        found, of_rows = run(given | options, scale, dtype, options.pop("device", "cpu"))
        assert_close(found, truth, allowed)
        assert_same_statistics(of_rows, of_truth, max(allowed, 1e-9))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_tiles_equal_the_reference(feature: str, shape: tuple[int, int]) -> None:
    for scale, workspace_mib in ((20.0, 2**-8), (500.0, 2**-8), (20.0, 16)):
        options = {"implementation": "chunked", "workspace_mib": workspace_mib}
        compare(feature, shape, torch.float64, 1e-11, scale, **options)
        compare(feature, shape, torch.float32, 1e-5 if scale == 20 else 1e-3, scale, **options)
