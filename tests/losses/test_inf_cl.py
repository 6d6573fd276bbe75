"""The tiled loss against the float64 full matrix: its value and all three gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from losses import inf_cl_loss
from losses.triton.launch import interpreted

# Without a GPU the kernels run under Triton's interpreter; with one, tests/losses/test_fused.py runs them.
IMPLEMENTATIONS = ("chunked", "dense", "triton") if interpreted() else ("chunked",)
TINY_MIB = 2**-7  # 8 KiB: many tiles, the last ones partial


def embeddings(queries: int, passages: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float64 unit vectors; passage i is similar to query i."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, dims, dtype=torch.float64, generator=generator)
    passage = torch.randn(passages, dims, dtype=torch.float64, generator=generator)
    shared = min(queries, passages)
    passage[:shared] += query[:shared]
    return normalize(query, dim=1), normalize(passage, dim=1)


def value_and_gradients(
    query: Tensor, passage: Tensor, logit_scale: float, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """The loss of embeddings cast to `dtype`, and its gradients for an upstream gradient of 0.7."""
    query, passage = (side.detach().to(dtype).requires_grad_() for side in (query, passage))
    scale = torch.tensor(logit_scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    loss = inf_cl_loss(query, passage, logit_scale=scale, **options)
    gradients = torch.autograd.grad(loss, (query, passage, scale), torch.tensor(0.7, dtype=loss.dtype))
    for leaf, gradient in zip((query, passage, scale), gradients, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    found = (loss.detach(), *gradients)
    return dict(zip(("loss", "query", "passage", "logit_scale"), (each.double() for each in found), strict=True))


def assert_as_close_as_full_matrix(
    query: Tensor, passage: Tensor, logit_scale: float, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """The error is at most three times that of the full matrix in the same dtype, plus a few roundings."""
    query, passage = query.to(dtype).double(), passage.to(dtype).double()
    truth = value_and_gradients(query, passage, logit_scale, torch.float64, implementation="full", **options)
    plain = value_and_gradients(query, passage, logit_scale, dtype, implementation="full", **options)
    longest_query, longest_passage = float(query.norm(dim=1).max()), float(passage.norm(dim=1).max())
    largest_score = abs(logit_scale) * longest_query * longest_passage
    # Size of one term of each sum, which multiplies the rounding error of a score.
    term = {
        "loss": 1.0,
        "query": abs(logit_scale) * longest_passage,
        "passage": abs(logit_scale) * longest_query,
        "logit_scale": longest_query * longest_passage,
    }
    for implementation in IMPLEMENTATIONS:
        found = value_and_gradients(
            query, passage, logit_scale, dtype, implementation=implementation, **{"workspace_mib": TINY_MIB} | options
        )
        # The dense kernels round logarithms once more, the tile kernels exponents of 2.
        roundings = 2 if implementation == "chunked" else 4
        for name, oracle in truth.items():
            allowed = 3 * float((plain[name] - oracle).norm())
            allowed += roundings * torch.finfo(torch.float32).eps * (1 + largest_score) * term[name]
            assert float((found[name] - oracle).norm()) <= allowed, (implementation, name)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("queries", "passages", "dims"),
    [
        (1, 1, 1),
        (1, 1, 7),
        (1, 37, 5),
        (2, 3, 1),
        (31, 31, 13),
        (29, 97, 17),
        (64, 64, 64),
        (127, 131, 48),
        (3, 499, 8),
    ],
)
def test_tiles_equal_the_oracle_at_odd_sizes(queries: int, passages: int, dims: int, symmetric: bool) -> None:
    assert_as_close_as_full_matrix(*embeddings(queries, passages, dims), 20.0, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("logit_scale", [0.0, 1e-3, 1.0, -5.0, 74.0, 100.0, -100.0, 1e4, -1e4])
def test_any_logit_scale(logit_scale: float, symmetric: bool) -> None:
    assert_as_close_as_full_matrix(*embeddings(53, 71, 16), logit_scale, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("length", [1e-12, 1e-3, 30.0, 1e3])
def test_unnormalized_embeddings(length: float, symmetric: bool) -> None:
    query, passage = embeddings(41, 43, 16)
    lengths = torch.logspace(-1, 0, 41, dtype=torch.float64)[:, None]
    assert_as_close_as_full_matrix(query * lengths * length, passage * length, 2.0, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_get_accurate_half_precision_gradients(dtype: torch.dtype, symmetric: bool) -> None:
    assert_as_close_as_full_matrix(*embeddings(67, 101, 24), 30.0, dtype, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
def test_positives_permuted_and_shared(symmetric: bool) -> None:
    query, passage = embeddings(61, 83, 16)
    permuted = torch.randperm(83, generator=torch.Generator().manual_seed(1))[:61]
    assert_as_close_as_full_matrix(query, passage, 20.0, positive=permuted, symmetric=symmetric)
    assert_as_close_as_full_matrix(query, passage, 20.0, positive=permuted % 7, symmetric=symmetric)
    assert_as_close_as_full_matrix(query, passage[:5], 20.0, positive=permuted.int() % 5, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("logit_scale", [20.0, 1e4])  # shared shift, running maxima
def test_masked_by_ids(logit_scale: float, symmetric: bool) -> None:
    query, passage = embeddings(61, 83, 16)
    options: dict[str, Any] = {"symmetric": symmetric}
    few = torch.arange(83) % 9
    assert_as_close_as_full_matrix(query, passage, logit_scale, passage_ids=few, **options)
    # Ids beyond int32 and beyond a float mantissa: neighboring values are not equal.
    far = torch.tensor([-(2**63), 2**63 - 1, 2**63 - 2, 2**53, 2**53 + 1, 0, 2**32])[torch.arange(83) % 7]
    assert_as_close_as_full_matrix(query, passage, logit_scale, passage_ids=far, **options)
    positive = torch.arange(61) % 19
    own = torch.arange(61) % 4
    ids = {"query_ids": own.int(), "passage_ids": (torch.arange(83) % 5).to(torch.int16)}
    assert_as_close_as_full_matrix(query, passage, logit_scale, positive=positive, **ids, **options)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("logit_scale", [20.0, 1e4])
def test_everything_but_the_positives_masked(logit_scale: float, symmetric: bool) -> None:
    query, passage = embeddings(23, 31, 8)
    found = value_and_gradients(
        query, passage, logit_scale, torch.float32, passage_ids=torch.zeros(31, dtype=torch.int64),
        symmetric=symmetric, implementation="chunked", workspace_mib=TINY_MIB,
    )  # fmt: skip
    assert found["loss"] == 0
    for name in ("query", "passage", "logit_scale"):
        # P − 1 at the positives, where P is 1 up to rounding.
        assert float(found[name].abs().max()) <= abs(logit_scale) * 2**-22, name


def brute_force(query: Tensor, passage: Tensor, positive: list[int], ids: tuple[list[int], list[int]]) -> Tensor:
    """The symmetric loss entry by entry, by the docstring of inf_cl_loss."""
    total = torch.zeros((), dtype=torch.float64)
    scores = 3.0 * query @ passage.T
    rows, columns = range(len(query)), range(len(passage))

    def negative_or_own(i: int, j: int) -> bool:
        return not (ids[1][j] == ids[0][i] and j != positive[i])

    for i, own in enumerate(positive):
        row = [scores[i, j] for j in columns if negative_or_own(i, j)]
        column = [scores[other, own] for other in rows if negative_or_own(other, own)]
        total += torch.stack(row).logsumexp(0) + torch.stack(column).logsumexp(0) - 2 * scores[i, own]
    return total / (2 * len(query))


@pytest.mark.parametrize("implementation", ["full", *IMPLEMENTATIONS])
def test_meaning_of_ids_and_shared_positives(implementation: Any) -> None:
    # The kernels do not support float64; the other implementations are tested in it.
    kernels = implementation in ("dense", "triton")
    query, passage = (side.float() if kernels else side for side in embeddings(6, 8, 4))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        positive = torch.randint(8, (6,), generator=generator)
        query_ids, passage_ids = (torch.randint(3, (rows,), generator=generator) for rows in (6, 8))
        found = inf_cl_loss(
            query, passage, logit_scale=3.0, positive=positive, symmetric=True, query_ids=query_ids,
            passage_ids=passage_ids, implementation=implementation,
        )  # fmt: skip
        ids = query_ids.tolist(), passage_ids.tolist()
        expected = brute_force(query.double(), passage.double(), positive.tolist(), ids)
        if kernels:
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        else:
            torch.testing.assert_close(found, expected)


def test_queries_compete_in_the_column_of_a_shared_positive_but_not_of_equal_ids() -> None:
    query = torch.eye(2, dtype=torch.float64)[:1].expand(2, 2).contiguous()
    shared = inf_cl_loss(
        query, query[:1], logit_scale=1.0, symmetric=True, positive=torch.zeros(2, dtype=torch.int64),
        passage_ids=torch.tensor([4]),
    )  # fmt: skip
    apart = inf_cl_loss(query, query, logit_scale=1.0, symmetric=True, passage_ids=torch.tensor([4, 4]))
    assert float(shared) == pytest.approx(math.log(2) / 2)
    assert float(apart) == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("logit_scale", [41.3, 58.3, 99.7, 1000.0])
def test_a_small_loss_is_accurate_relative_to_its_size(logit_scale: float, symmetric: bool) -> None:
    # All pairs of rows have cosine 0.75: a loss of about 39 exp(-logit_scale / 4), with scores near logit_scale.
    query = normalize(torch.eye(40) + 0.2306, dim=1)
    options: dict[str, Any] = {"logit_scale": logit_scale, "symmetric": symmetric, "workspace_mib": TINY_MIB}
    truth = float(inf_cl_loss(query.double(), query.double(), **options, implementation="full"))
    found = float(inf_cl_loss(query, query, **options, implementation="chunked"))
    assert found >= 0
    assert found == pytest.approx(truth, rel=logit_scale * 2**-21, abs=2**-22)


def test_a_small_logit_scale_is_accurate_to_the_last_bits() -> None:
    for seed in range(20):
        query, passage = embeddings(2, 2, 4, seed)
        truth = inf_cl_loss(query, passage, logit_scale=1e-3, symmetric=True, implementation="full")
        found = inf_cl_loss(query.float(), passage.float(), logit_scale=1e-3, symmetric=True, implementation="chunked")
        assert float(found) == pytest.approx(float(truth), abs=3 * 2**-24)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 40),
    more=st.integers(0, 40),
    dims=st.integers(1, 12),
    logit_scale=st.sampled_from([-30.0, 1e-3, 5.0, 60.0, 300.0, 1e4]),
    symmetric=st.booleans(),
    id_count=st.sampled_from([0, 1, 2, 10]),
    workspace_mib=st.sampled_from([2**-12, 2**-9, 2**-7, 2**-5]),
    seed=st.integers(0, 1000),
)
def test_tiles_equal_the_oracle_for_random_options(
    queries: int,
    more: int,
    dims: int,
    logit_scale: float,
    symmetric: bool,
    id_count: int,
    workspace_mib: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, passage = embeddings(queries, queries + more, dims, seed)
    options: dict[str, Any] = {"symmetric": symmetric, "workspace_mib": workspace_mib}
    options["positive"] = torch.randint(queries + more, (queries,), generator=generator)
    if id_count:
        options["passage_ids"] = torch.randint(id_count, (queries + more,), generator=generator)
    assert_as_close_as_full_matrix(query, passage, logit_scale, **options)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("logit_scale", [5.0, 300.0])  # shared shift, running maxima
def test_gradcheck(logit_scale: float, symmetric: bool) -> None:
    query, passage = (side.requires_grad_() for side in embeddings(5, 7, 3))
    scale = torch.tensor(logit_scale, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"positive": torch.tensor([6, 0, 0, 3, 2]), "passage_ids": torch.arange(7) % 5}

    def loss(query: Tensor, passage: Tensor, scale: Tensor) -> Tensor:
        return inf_cl_loss(
            query, passage, logit_scale=scale, symmetric=symmetric, implementation="chunked",
            workspace_mib=2**-11, **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (query, passage, scale))


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)])
def test_only_required_gradients_are_computed(wanted: tuple[bool, bool, bool]) -> None:
    query, passage = embeddings(11, 13, 4)
    everything = value_and_gradients(query, passage, 9.0, torch.float64, symmetric=True, implementation="chunked")
    scale = torch.tensor(9.0, dtype=torch.float64)
    leaves = [leaf.requires_grad_(asked) for leaf, asked in zip((query, passage, scale), wanted, strict=True)]
    (0.7 * inf_cl_loss(leaves[0], leaves[1], logit_scale=leaves[2], symmetric=True)).backward()
    for name, leaf in zip(("query", "passage", "logit_scale"), leaves, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, everything[name])


@pytest.mark.parametrize("implementation", ["chunked", "triton", "dense"])
def test_second_derivatives_raise_instead_of_vanishing(implementation: Any) -> None:
    query, passage = (side.float().requires_grad_() for side in embeddings(3, 3, 2))
    loss = inf_cl_loss(query, passage, logit_scale=1.0, implementation=implementation)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_inputs_modified_before_backward_raise() -> None:
    query, passage = (side.requires_grad_() for side in embeddings(3, 3, 2))
    loss = inf_cl_loss(query, passage, logit_scale=1.0, implementation="chunked")
    with torch.no_grad():
        query.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_views_and_transposed_embeddings() -> None:
    query, passage = embeddings(20, 30, 6)
    expected = value_and_gradients(query, passage, 8.0, torch.float64, implementation="full", symmetric=True)
    strided = (query.T.contiguous().T, passage.repeat(2, 1)[:30])
    found = value_and_gradients(
        *strided, 8.0, torch.float64, implementation="chunked", symmetric=True, workspace_mib=TINY_MIB
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", ["full", *IMPLEMENTATIONS])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 6, 8])
def test_non_finite_embeddings_give_a_non_finite_loss(
    row: int, bad: float, symmetric: bool, implementation: Any
) -> None:
    for side in (0, 1):
        pair = [each.float().abs() for each in embeddings(7, 9, 3)]
        if row >= len(pair[side]):
            continue
        # With positive components only, a component of minus infinity gives scores that add zero to every sum.
        pair[side][row, 1] = bad
        pair = [each.requires_grad_() for each in pair]
        # Passage 8 is masked for every query, so its values are in no sum.
        ids = {"query_ids": torch.ones(7, dtype=torch.int64), "passage_ids": (torch.arange(9) == 8).long()}
        loss = inf_cl_loss(*pair, logit_scale=4.0, symmetric=symmetric, implementation=implementation, **ids)
        loss.backward()
        assert not loss.isfinite()


def test_scores_that_overflow_give_a_non_finite_loss() -> None:
    query = torch.full((3, 2), 1e30)
    assert not inf_cl_loss(query, query, logit_scale=1.0, symmetric=True).isfinite()
