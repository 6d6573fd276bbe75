"""`positives`, `negatives` and `statistics`: the reference by the definition, implementations by the reference."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from option_cases import FEATURES, assert_close, assert_same_statistics, case, definition, moved, run

from losses import Guide, InfCLLoss, NegativeLimit, Negatives, Positives, inf_cl_loss, sigmoid_loss
from losses.triton.launch import interpreted

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU instead")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


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
BOTH = list(itertools.product([False, True], repeat=2))


def compare(
    given: dict[str, Any], dtype: torch.dtype, allowed: float, scale: float, device: str = "cpu", **options: Any
) -> None:
    """Compare value, gradients and statistics with the reference."""
    truth, of_truth = run(given | {"implementation": "full"}, scale, torch.float64)
    found, of_rows = run(given | options, scale, dtype, device)
    # A loss of zero is a difference of two scores, each rounded to float32.
    rounding = 0.0 if dtype == torch.float64 else torch.finfo(torch.float32).eps * scale
    assert_close(found, truth, allowed, rounding)
    assert_same_statistics(of_rows, of_truth, max(allowed, 1e-9))


def batch(feature: str, shape: tuple[int, int], symmetric: bool, random_positive: bool, **more: Any) -> dict[str, Any]:
    """A case with excluded pairs and ids if both or neither of symmetric and random_positive."""
    masks = symmetric == random_positive
    given = case(feature, *shape, random_positive=random_positive, excluded=masks, ids=masks, **more)
    return given | {"symmetric": symmetric}


@pytest.mark.parametrize("feature", FEATURES)
def test_tiles_equal_the_reference(feature: str) -> None:
    for shape, (symmetric, random_positive) in itertools.product(SHAPES, BOTH):
        given = batch(feature, shape, symmetric, random_positive)
        options: dict[str, Any] = {"implementation": "chunked", "workspace_mib": 2**-8}
        for scale in (20.0, 500.0):
            compare(given, torch.float64, 1e-11, scale, **options)
        if shape[0] > 1:
            compare(given, torch.float32, 1e-5, 20.0, implementation="chunked")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("feature", FEATURES)
def test_kernels_equal_the_reference(feature: str, device: str) -> None:
    pytest.importorskip("triton")
    # The interpreter is slow: on a CPU, one shift in one case and running maxima in another.
    shapes = [(37, 53)] if device == "cpu" else [*SHAPES, (257, 391), (700, 1500)]
    for shape, (symmetric, random_positive) in itertools.product(shapes, BOTH[::3] if device == "cpu" else BOTH):
        scales = [20.0 if random_positive else 500.0] if device == "cpu" else [20.0, 500.0]
        for scale in scales:
            given = batch(feature, shape, symmetric, random_positive)
            options: dict[str, Any] = {"implementation": "triton", "workspace_mib": 2**-5, "device": device}
            compare(given, torch.float32, 1e-5 if scale == 20 else 1e-3, scale, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_of_one_row_equal_the_reference(device: str) -> None:
    pytest.importorskip("triton")
    for shape in ((1, 1), (1, 7)):
        compare(batch("all mean", shape, True, True), torch.float32, 1e-5, 20.0, device, implementation="triton")


@pytest.mark.parametrize("device", DEVICES)
def test_dense_kernels_give_the_same_statistics(device: str) -> None:
    pytest.importorskip("triton")
    shapes = [(1, 1), (1, 7), (61, 531)] if device == "cpu" else [(1, 1), (1, 7), (61, 531), (1031, 1536)]
    for shape, (symmetric, random_positive) in itertools.product(shapes, BOTH):
        given = batch("none", shape, symmetric, random_positive)
        compare(given, torch.float32, 2e-5, 20.0, device, implementation="dense")


def test_the_dense_loss_names_what_it_has_not() -> None:
    for name, options in (("positives", {"positives": Positives(torch.zeros(0, 2).long())}),
                          ("negatives", {"negatives": Negatives(hardness=1.0)})):  # fmt: skip
        with pytest.raises(ValueError, match=f"^implementation 'dense' does not support {name}"):
            inf_cl_loss(QUERY, PASSAGE, logit_scale=1.0, implementation="dense", **options)


HALVES = [(torch.bfloat16, 4e-3, "cuda"), (torch.float16, 1e-3, "cuda"), (torch.float16, 1e-3, "cpu")]


@pytest.mark.parametrize(
    ("dtype", "gradient", "device"),
    [pytest.param(*each, marks=DEVICES[each[2] == "cuda"].marks) for each in HALVES],
)
@pytest.mark.parametrize("feature", FEATURES)
def test_half_precision_is_within_its_rounding(feature: str, dtype: torch.dtype, gradient: float, device: str) -> None:
    pytest.importorskip("triton")
    # The interpreter is slow.
    shape, cases = ((1031, 1536), BOTH) if device == "cuda" else ((37, 53), BOTH[-1:])
    for symmetric, random_positive in cases:
        given = batch(feature, shape, symmetric, random_positive, dims=200, dtype=dtype, exact=True)
        truth, of_truth = run(given | {"implementation": "full"}, 50.0, torch.float64, device)
        found, of_rows = run(given | {"implementation": "triton"}, 50.0, dtype, device)
        assert_close(found[:1], truth[:1], 1e-4)
        assert_close(found[1:3], truth[1:3], gradient)
        # The gradient of logit_scale is a sum over the queries whose terms, each rounded, may cancel.
        terms = (given["query"] * truth[1]).sum(1) / 50.0
        assert float(terms.sum()) == pytest.approx(float(truth[3]), abs=1e-9)
        assert abs(found[3] - truth[3]) <= gradient * (abs(truth[3]) + terms.norm())
        assert_same_statistics(of_rows, of_truth, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_guides_of_any_width_fit_shared_memory(dtype: torch.dtype) -> None:
    for dims, width in itertools.product((64, 384, 768, 1152), repeat=2):
        query, passage = (torch.randn(300, dims, device="cuda") / dims**0.5 for _ in range(2))
        guide = Guide(*(torch.randn(300, width, device="cuda").to(dtype) for _ in range(2)), margin=width**0.5)
        given = {"query": query.to(dtype), "passage": passage.to(dtype), "negatives": Negatives(guide=guide)}
        truth, _ = run(given | {"implementation": "full"}, 5.0, torch.float64, "cuda")
        found, _ = run(given | {"implementation": "triton"}, 5.0, dtype, "cuda")
        assert_close(found[1:], truth[1:], 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_passage_equal_to_the_positive_stays_within_a_limit_of_no_margin(dtype: torch.dtype) -> None:
    query, passage = (torch.randn(500, 200, device="cuda").to(dtype) for _ in range(2))
    options: dict[str, Any] = {"logit_scale": 0.1, "implementation": "triton", "statistics": True}
    limit = Negatives(limit=NegativeLimit(margin=0.0))
    _, once = inf_cl_loss(query, passage, negatives=limit, **options)
    _, twice = inf_cl_loss(query, torch.cat([passage, passage]), negatives=limit, **options)
    assert torch.equal(twice.masked, 2 * once.masked)
    assert torch.equal(twice.rank, torch.ones_like(twice.rank))


@pytest.mark.gpu
@pytest.mark.parametrize("feature", ["none", "all mean", "all sum"])
@pytest.mark.parametrize("implementation", ["auto", "chunked", "triton"])
def test_a_step_with_options_does_not_synchronize(implementation: str, feature: str) -> None:
    given = moved(case(feature, 300, 500, random_positive=True, excluded=True), "cuda")
    query, passage = (given.pop(side).float().requires_grad_() for side in ("query", "passage"))
    options = {"logit_scale": torch.tensor(10.0, device="cuda"), "symmetric": True, "implementation": implementation}
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = inf_cl_loss(query, passage, **options, **given)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["full", "chunked", "triton"])
def test_an_invalid_positive_pair_on_a_gpu_makes_the_loss_nan(implementation: Any) -> None:
    query, passage = (torch.randn(rows, 8, device="cuda") for rows in (4, 6))
    options: dict[str, Any] = {"logit_scale": 5.0, "implementation": implementation}
    for pair in ([0, 6], [-1, 0], [4, 0]):
        pairs = torch.tensor([[0, 1], pair], device="cuda")
        assert inf_cl_loss(query, passage, positives=Positives(pairs), **options).isnan()
        assert inf_cl_loss(query, passage, positives=Positives(pairs[:1]), **options).isfinite()
    positive = torch.tensor([0, 1, 2, 6], device="cuda")
    assert inf_cl_loss(query, passage, positive=positive, statistics=True, **options)[0].isnan()
    positives = Positives(torch.tensor([[0, 1]], device="cuda"))
    assert inf_cl_loss(query, passage, positives=positives, excluded=positives.pairs, **options).isnan()


def test_values_that_are_not_finite_make_the_loss_nan() -> None:
    for implementation, bad in itertools.product(["full", "chunked"], [torch.nan, torch.inf]):
        given = case("all mean", 9, 14)
        given["passage"][13, 2] = bad
        loss, _ = inf_cl_loss(**given, logit_scale=3.0, symmetric=True, implementation=implementation)
        assert loss.isnan()


def test_the_loss_with_options_is_differentiable_once() -> None:
    query = QUERY.clone().requires_grad_()
    loss, _ = inf_cl_loss(query, PASSAGE, logit_scale=2.0, statistics=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_the_module_passes_its_options_on() -> None:
    given = case("all mean", 7, 11, excluded=True)
    module = InfCLLoss(logit_scale=6.0, symmetric=True)
    loss, statistics = module(given.pop("query"), given.pop("passage"), **given)
    given = case("all mean", 7, 11, excluded=True)
    expected, of_rows = inf_cl_loss(**given, logit_scale=module.logit_scale, symmetric=True)
    assert torch.equal(loss, expected)
    assert_same_statistics(statistics, of_rows, 0)


@pytest.mark.parametrize(("feature", "statistics"), [("all mean", True), ("all sum", False)])
def test_a_compiled_loss_with_options_gives_the_same(feature: str, statistics: bool) -> None:
    given = batch(feature, (19, 23), True, True) | {"statistics": statistics}
    compiled = torch.compile(inf_cl_loss, fullgraph=True, backend="aot_eager")
    truth, of_truth = run(dict(given), 20.0, torch.float32)
    found, of_rows = run(dict(given), 20.0, torch.float32, loss=compiled)
    assert_close(found, truth, 1e-6)
    if statistics:
        assert_same_statistics(of_rows, of_truth, 1e-6)


@pytest.mark.parametrize("feature", ["margin", "below", "share", "guide"])
def test_the_sigmoid_loss_removes_negatives(feature: str) -> None:
    for shape, random_positive in itertools.product([(1, 7), (19, 23), (61, 131)], [False, True]):
        given = case(feature, *shape, random_positive=random_positive, excluded=random_positive, ids=random_positive)
        del given["statistics"]
        sigmoid = functools.partial(sigmoid_loss, logit_bias=-3.0)
        truth, _ = run(given | {"implementation": "full"}, 10.0, torch.float64, loss=sigmoid)
        if random_positive and shape[0] > 1:
            without, _ = run({**given, "implementation": "full", "negatives": None}, 10.0, torch.float64, loss=sigmoid)
            assert float(without[0] - truth[0]) > 1e-4
        for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            options: dict[str, Any] = {"implementation": "chunked", "workspace_mib": 2**-8}
            found, _ = run(given | options, 10.0, dtype, loss=sigmoid)
            assert_close(found, truth, allowed)


def test_the_sigmoid_loss_with_a_limit_follows_its_definition() -> None:
    given = case("below", 9, 14)
    loss = sigmoid_loss(
        given["query"], given["passage"], logit_scale=7.0, logit_bias=-2.0, negatives=given["negatives"],
        implementation="full",
    )  # fmt: skip
    c = given["query"] @ given["passage"].T
    own = torch.eye(9, 14, dtype=torch.bool)
    x = 7 * c - 2
    losses = -torch.nn.functional.logsigmoid(torch.where(own, x, -x))
    losses[(c > c.diagonal()[:, None] - 0.1) & ~own] = 0
    assert float(loss) == pytest.approx(float(losses.sum() / 9), rel=1e-12)


def test_the_sigmoid_loss_names_what_it_does_not_support() -> None:
    limit = Negatives(limit=NegativeLimit(share=0.9))
    for message, options in (
        ("negatives.hardness does not apply", {"negatives": Negatives(hardness=1.0)}),
        ("implementation 'triton' of the sigmoid loss", {"negatives": limit, "implementation": "triton"}),
    ):
        with pytest.raises(ValueError, match="^" + message):
            sigmoid_loss(QUERY, PASSAGE, logit_scale=1.0, logit_bias=0.0, **options)
