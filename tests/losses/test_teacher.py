"""Distillation from a teacher: its embeddings over the whole pool, or given scores of a list for each query."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, normalize

from losses import InfCLLoss, inf_cl_loss
from losses.options import Positives, Teacher, TeacherScores
from losses.triton.launch import interpreted

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU instead")
DEVICES = [pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
GENERATOR_SEED = 3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(queries: int, passages: int, dims: int) -> tuple[Tensor, Tensor]:
    """float64 unit vectors; passage i is similar to query i."""
    query, passage = random(queries, dims, seed=0), random(passages, dims, seed=1)
    passage[:queries] += 0.5 * query[:passages]
    return normalize(query, dim=1), normalize(passage, dim=1)


def pool_teacher(queries: int, passages: int, dims: int, scale: float = 15.0) -> Teacher:
    sides = (normalize(random(rows, dims, seed=rows), dim=1) for rows in (queries, passages))
    return Teacher(*sides, scale=scale, weight=0.7)


def list_teacher(queries: int, passages: int, kind: Any) -> TeacherScores:
    """Lists of 0 to 5 passages."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    offsets = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.randint(6, (queries,), generator=generator).cumsum(0)]
    )
    rows = torch.randint(passages, (int(offsets[-1]),), generator=generator)
    return TeacherScores(rows, offsets, torch.randn(len(rows), generator=generator), kind, scale=2.0, weight=0.3)


def moved(teacher: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    fields = {}
    for name, value in vars(teacher).items():
        if isinstance(value, Tensor):
            value = value.to(device, dtype if value.is_floating_point() and dtype is not None else value.dtype)
        fields[name] = value
    return type(teacher)(**fields)


def step(query: Tensor, passage: Tensor, logit_scale: float, **options: Any) -> list[Tensor]:
    """Loss and gradients of query, passage and logit_scale, in float64 on the CPU."""
    leaves = [side.detach().requires_grad_() for side in (query, passage)]
    wide = torch.promote_types(query.dtype, torch.float32)
    leaves.append(torch.tensor(logit_scale, dtype=wide, device=query.device, requires_grad=True))
    options = {name: each.to(query.device) if isinstance(each, Tensor) else each for name, each in options.items()}
    loss = inf_cl_loss(leaves[0], leaves[1], logit_scale=leaves[2], **options)
    return [each.double().cpu() for each in (loss.detach(), *torch.autograd.grad(loss, leaves))]


def errors(
    query: Tensor, passage: Tensor, logit_scale: float, dtype: torch.dtype, device: str, teacher: Any, **options: Any
) -> list[float]:
    """Relative errors against the definition in float64, of embeddings rounded to `dtype`."""
    query, passage = query.to(dtype), passage.to(dtype)
    narrow = moved(teacher, device, dtype if isinstance(teacher, Teacher) else None)
    how = {name: options.pop(name) for name in ("implementation", "precision", "workspace_mib") if name in options}
    wide = moved(narrow, "cpu", torch.float64)
    truth = step(query.double(), passage.double(), logit_scale, implementation="full", teacher=wide, **options)
    found = step(query.to(device), passage.to(device), logit_scale, teacher=narrow, **how, **options)
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


def masks(queries: int, passages: int) -> dict[str, Tensor]:
    """Positives, ids and excluded pairs."""
    generator = torch.Generator().manual_seed(1)
    positive = torch.randint(passages, (queries,), generator=generator)
    rows, columns = (torch.randint(size, (12,), generator=generator) for size in (queries, passages))
    return {
        "positive": positive,
        "passage_ids": torch.arange(passages) % 7,
        "excluded": torch.stack([rows, columns], 1)[columns != positive[rows]],
    }


def test_reference_adds_the_divergence_over_the_pool() -> None:
    query, passage = batch(9, 13, 12)
    teacher = pool_teacher(9, 13, 5)
    scores = 7 * query @ passage.T
    theirs = teacher.scale * teacher.query @ teacher.passage.T
    divergence = kl_div(scores.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    expected = cross_entropy(scores, torch.arange(9)) + teacher.weight * divergence
    found = inf_cl_loss(query, passage, logit_scale=7.0, teacher=teacher, implementation="full")
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_reference_adds_the_losses_of_lists() -> None:
    query, passage = batch(3, 5, 12)
    offsets, rows = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 4, 3, 2, 1])
    given = torch.tensor([2.0, 0.5, 1.0, 3.0, 1.0], dtype=torch.float64)
    scores, plain = 7 * query @ passage.T, inf_cl_loss(query, passage, logit_scale=7.0, implementation="full")
    lists = [(scores[0, rows[:3]], 2 * given[:3]), (scores[2, rows[3:]], 2 * given[3:])]
    divergence = sum(
        float(kl_div(ours.log_softmax(0), theirs.log_softmax(0), reduction="sum", log_target=True))
        for ours, theirs in lists
    )
    margins = sum(float((((ours[0] - ours[1:]) - (theirs[0] - theirs[1:])) ** 2).mean()) for ours, theirs in lists)
    for kind, total in (("kl", divergence), ("margin_mse", margins)):
        teacher = TeacherScores(rows, offsets, given, kind, scale=2.0, weight=0.3)  # type: ignore[arg-type]
        found = inf_cl_loss(query, passage, logit_scale=7.0, teacher=teacher, implementation="full")
        assert float(found - plain) == pytest.approx(0.3 * total / 3, rel=1e-10)


@pytest.mark.parametrize(
    ("symmetric", "masked", "logit_scale"), itertools.product([False, True], [False, True], [20.0, 300.0])
)
@pytest.mark.parametrize("kind", ["pool", "kl", "margin_mse"])
def test_tiles_with_a_teacher_equal_the_reference(kind: str, symmetric: bool, masked: bool, logit_scale: float) -> None:
    query, passage = batch(23, 41, 29)
    teacher = pool_teacher(23, 41, 13) if kind == "pool" else list_teacher(23, 41, kind)
    options = {"symmetric": symmetric, "implementation": "chunked", "workspace_mib": 0.02}
    options |= masks(23, 41) if masked else {}
    assert max(errors(query, passage, logit_scale, torch.float64, "cpu", teacher, **options)) <= 1e-12
    assert max(errors(query, passage, logit_scale, torch.float32, "cpu", teacher, **options)) <= 1e-5
    if logit_scale < 100:
        assert max(errors(query, passage, logit_scale, torch.bfloat16, "cpu", teacher, **options)) <= 6e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "symmetric", "masked", "logit_scale", "teacher_scale"),
    [
        ("pool", True, False, 20.0, 15.0),
        ("pool", False, True, 20.0, 15.0),
        ("pool", True, True, 20.0, 200.0),  # no constant shift is safe for the teacher
        ("pool", True, False, 300.0, 15.0),  # nor for the student
        ("kl", True, True, 20.0, 1.0),
        ("margin_mse", False, False, 20.0, 1.0),
    ],
)
def test_kernels_with_a_teacher_equal_the_reference(
    kind: str, symmetric: bool, masked: bool, logit_scale: float, teacher_scale: float, device: str
) -> None:
    query, passage = batch(37, 53, 29)
    teacher = pool_teacher(37, 53, 13, teacher_scale) if kind == "pool" else list_teacher(37, 53, kind)
    options = {"symmetric": symmetric, "implementation": "triton", "workspace_mib": 0.05}
    options |= masks(37, 53) if masked else {}
    assert max(errors(query, passage, logit_scale, torch.float32, device, teacher, **options)) <= 1e-5


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_a_teacher_that_is_the_student_adds_nothing(implementation: Any) -> None:
    query, passage = (side.float() for side in batch(11, 17, 8))
    teacher = Teacher(query.clone(), passage.clone(), scale=9.0, weight=5.0)
    with_teacher = step(query, passage, 9.0, teacher=teacher, implementation=implementation)
    for one, other in zip(with_teacher, step(query, passage, 9.0, implementation=implementation), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["full", "chunked", "triton"])
@pytest.mark.parametrize("kind", ["pool", "kl", "margin_mse"])
def test_one_row_with_a_teacher(kind: str, implementation: Any) -> None:
    query, passage = (side.float() for side in batch(1, 1, 7))
    teacher: Any = pool_teacher(1, 1, 3)
    if kind != "pool":
        teacher = TeacherScores(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([4.0]), kind)  # type: ignore[arg-type]
    loss, *gradients = step(query, passage, 9.0, teacher=teacher, implementation=implementation)
    assert abs(float(loss)) <= 1e-5 and all(float(each.norm()) <= 1e-5 for each in gradients)


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_empty_lists_add_nothing(kind: Any) -> None:
    query, passage = (side.float() for side in batch(5, 6, 7))
    none = torch.zeros(0, dtype=torch.int64)
    teacher = TeacherScores(none, torch.zeros(6, dtype=torch.int64), torch.zeros(0), kind)
    for implementation in ("full", "chunked", "triton"):
        found = step(query, passage, 9.0, teacher=teacher, implementation=implementation)
        for one, other in zip(found, step(query, passage, 9.0, implementation="full"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


SIDES = torch.ones(3, 4), torch.ones(5, 4)
LISTS = torch.tensor([0, 4]), torch.tensor([0, 2, 2, 2]), torch.ones(2)


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("teacher must be a Teacher or TeacherScores, found str", {"teacher": "model"}),
        (r"teacher.query must have shape \[3, dimensions\], found \[2, 4\]",
         {"teacher": Teacher(torch.ones(2, 4), SIDES[1], 1.0)}),
        ("teacher.passage has 3 dimensions, teacher.query has 4",
         {"teacher": Teacher(SIDES[0], torch.ones(5, 3), 1.0)}),
        ("teacher.passage must be float32", {"teacher": Teacher(SIDES[0], torch.ones(5, 4).long(), 1.0)}),
        ("teacher.query is on meta", {"teacher": Teacher(SIDES[0].to("meta"), SIDES[1], 1.0)}),
        ("teacher.scale must be finite", {"teacher": Teacher(*SIDES, float("inf"))}),
        ("teacher.weight must be a number", {"teacher": Teacher(*SIDES, 1.0, "much")}),
        ("teacher.kind must be one of kl, margin_mse, found 'l2'", {"teacher": TeacherScores(*LISTS, "l2")}),
        (r"teacher.offsets must have shape \[4\], found \[2\]",
         {"teacher": TeacherScores(LISTS[0], LISTS[0], LISTS[2])}),
        ("teacher.offsets must rise from 0 to the 2",
         {"teacher": TeacherScores(LISTS[0], torch.tensor([0, 2, 1, 2]), LISTS[2])}),
        (r"teacher.scores must have shape \[2\], found \[3\]", {"teacher": TeacherScores(*LISTS[:2], torch.ones(3))}),
        ("teacher.passages must index the 5 passages, found 7",
         {"teacher": TeacherScores(torch.tensor([0, 7]), *LISTS[1:])}),
        ("teacher does not combine with positives",
         {"teacher": Teacher(*SIDES, 1.0), "positives": Positives(torch.tensor([[0, 1]]))}),
        ("implementation 'dense' does not support teacher",
         {"teacher": Teacher(*SIDES, 1.0), "implementation": "dense"}),
    ],
)  # fmt: skip
def test_wrong_teachers_are_refused_by_name(named: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        inf_cl_loss(*SIDES, logit_scale=1.0, **options)


def test_the_module_takes_a_teacher() -> None:
    query, passage = (side.float() for side in batch(7, 9, 8))
    teacher = pool_teacher(7, 9, 4)
    found = InfCLLoss(logit_scale=6.0)(query, passage, teacher=teacher)
    torch.testing.assert_close(found, inf_cl_loss(query, passage, logit_scale=6.0, teacher=teacher))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "precision", "allowed"),
    [
        (torch.bfloat16, "bf16", 4e-3),
        (torch.float16, "auto", 2e-3),
        (torch.float32, "tf32", 2e-3),
        (torch.float32, "fp32", 1e-5),
    ],
)
@pytest.mark.parametrize("kind", ["pool", "kl"])
def test_errors_of_the_teacher_kernels_on_the_gpu(
    kind: str, dtype: torch.dtype, precision: str, allowed: float
) -> None:
    for queries, passages, dims, symmetric in ((257, 263, 65, False), (1024, 1536, 768, True)):
        query, passage = batch(queries, passages, dims)
        teacher: Any = (
            list_teacher(queries, passages, kind) if kind == "kl" else pool_teacher(queries, passages, 200, 30.0)
        )
        found = errors(
            query, passage, 50.0, dtype, "cuda", teacher, implementation="triton", precision=precision,
            workspace_mib=16, symmetric=symmetric,
        )  # fmt: skip
        assert found[0] <= 2e-4 and max(found[1:3]) <= allowed, (queries, found)
