"""Own, frozen and same-side negatives: their definition, and tiles in PyTorch against the full matrix in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from negatives_batch import SOURCES, Batch, relative_errors, step
from torch import Tensor

from losses import InfCLLoss, Negatives, Ragged, inf_cl_loss

COMBINATIONS = [("own",), ("frozen",), ("same_side",), SOURCES]


def definition(batch: Batch, sources: tuple[str, ...], logit_scale: float, symmetric: bool) -> float:
    """The loss by its definition, one exponential after another."""
    query, passage = batch.query.tolist(), batch.passage.tolist()
    positive = list(range(len(query))) if batch.positive is None else batch.positive.tolist()
    ids = list(range(len(passage))) if batch.passage_ids is None else batch.passage_ids.tolist()
    has_ids = batch.passage_ids is not None
    removed = set() if batch.excluded is None else {tuple(pair) for pair in batch.excluded.tolist()}
    frozen_removed = set() if batch.excluded is None else {tuple(pair) for pair in batch.frozen_excluded.tolist()}

    def exp(a: list[float], b: list[float]) -> Tensor:
        return (logit_scale * torch.tensor(a, dtype=torch.float64) @ torch.tensor(b, dtype=torch.float64)).exp()

    def counts(i: int, j: int) -> bool:
        return (i, j) not in removed and not (has_ids and ids[j] == ids[positive[i]] and j != positive[i])

    losses = []
    for i, p in enumerate(positive):
        own_score = exp(query[i], passage[p])
        row = sum(exp(query[i], passage[j]) for j in range(len(passage)) if counts(i, j))
        column = sum(exp(query[k], passage[p]) for k in range(len(query)) if counts(k, p))
        if "own" in sources:
            row += sum(exp(query[i], v) for v in batch.own[batch.offsets[i] : batch.offsets[i + 1]].tolist())
        if "frozen" in sources:
            row += sum(exp(query[i], v) for f, v in enumerate(batch.frozen.tolist()) if (i, f) not in frozen_removed)
        if "same_side" not in sources:
            losses.append((row / own_score).log())
            if symmetric:
                losses.append((column / own_score).log())
            continue
        for k in range(len(query)):
            if k != i and not (has_ids and ids[positive[k]] == ids[p]):
                row += exp(query[i], query[k])
        if symmetric:
            row += column + sum(exp(passage[p], passage[j]) for j in range(len(passage)) if j != p and ids[j] != ids[p])
        losses.append((row / own_score).log())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("sources", COMBINATIONS)
@pytest.mark.parametrize(("symmetric", "masks"), itertools.product([False, True], repeat=2))
def test_the_full_matrix_is_the_definition(symmetric: bool, masks: bool, sources: tuple[str, ...]) -> None:
    batch = Batch.random(7, 11, frozen=5, masks=masks, random_positive=masks)
    found = step(batch, sources, 6.0, symmetric=symmetric, implementation="full")[0]
    assert float(found) == pytest.approx(definition(batch, sources, 6.0, symmetric), rel=1e-12)
    without = step(batch, (), 6.0, symmetric=symmetric, implementation="full")[0]
    assert abs(float(found - without)) > 1e-3


def test_the_single_partition_is_that_of_sentence_transformers() -> None:
    module = pytest.importorskip("sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking")
    batch = Batch.random(13, 13, masks=False, random_positive=False)
    # Of the model, the loss takes a place in `nn.Module` only.
    theirs = module.MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=20.0, directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    )
    expected = theirs.compute_loss_from_embeddings([batch.query, batch.passage], None)
    found = step(batch, ("same_side",), 20.0, symmetric=True, implementation="chunked")[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sources", COMBINATIONS)
@pytest.mark.parametrize("logit_scale", [20.0, 500.0])  # one shift, running maxima
@pytest.mark.parametrize(("queries", "passages"), [(61, 83), (37, 37), (1, 5), (1, 1), (2, 3)])
def test_tiles_equal_the_full_matrix(queries: int, passages: int, logit_scale: float, sources: tuple[str, ...]) -> None:
    for symmetric, masks in itertools.product([False, True], repeat=2):
        batch = Batch.random(queries, passages, masks=masks, random_positive=masks)
        options: dict[str, Any] = {"symmetric": symmetric}
        truth = step(batch, sources, logit_scale, **options, implementation="full")
        for dtype, workspace_mib in ((torch.float64, 0.01), (torch.float64, 64.0), (torch.float32, 0.01)):
            found = step(
                batch, sources, logit_scale, dtype, workspace_mib=workspace_mib, implementation="chunked", **options
            )
            # float32 rounds scores of 500 to 3e-5.
            allowed = 1e-11 if dtype == torch.float64 else 1e-5 if logit_scale == 20 else 2e-4
            # Gradients of a few rows may cancel to far below logit_scale, and to zero.
            floor = 0.01 * logit_scale if queries < 3 else 1e-6
            assert max(relative_errors(found, truth, floor)) <= allowed, (symmetric, masks, dtype)


def test_bfloat16_gradients_are_within_their_rounding() -> None:
    batch = Batch.random(131, 157, 64, masks=True, random_positive=False).rounded(torch.bfloat16)
    truth = step(batch, SOURCES, 20.0, symmetric=True, implementation="full")
    loss, *gradients = relative_errors(
        step(batch, SOURCES, 20.0, torch.bfloat16, symmetric=True, implementation="chunked"), truth
    )
    assert loss <= 1e-4 and max(gradients) <= 4e-3


def test_an_own_negative_is_seen_by_its_query_alone() -> None:
    batch = Batch.random(9, 9, masks=False, random_positive=False)
    query, passage = batch.query.clone().requires_grad_(), batch.passage
    values = batch.own.clone().requires_grad_()
    offsets = torch.tensor([0, 0, len(values)] + [len(values)] * 7)
    loss = inf_cl_loss(query, passage, logit_scale=5.0, negatives=Negatives(own=Ragged(values, offsets)))
    of_values, with_own = torch.autograd.grad(loss, (values, query))
    (without,) = torch.autograd.grad(inf_cl_loss(query, passage, logit_scale=5.0), query)
    changed = (with_own - without).abs().amax(1) > 1e-12
    assert changed.tolist() == [False, True] + [False] * 7
    # Each of its negatives pushes along the query.
    assert torch.allclose(of_values / of_values.norm(dim=1, keepdim=True), query[1].detach().expand_as(values))


def test_frozen_passages_equal_hard_negatives_in_the_pool() -> None:
    batch = Batch.random(23, 23, masks=False, random_positive=False)
    found = step(batch, ("frozen",), 20.0, implementation="chunked", workspace_mib=0.01)
    query, passage = batch.query.clone().requires_grad_(), torch.cat([batch.passage, batch.frozen])
    loss = inf_cl_loss(query, passage, logit_scale=20.0, implementation="full")
    (gradient,) = torch.autograd.grad(0.7 * loss, query)
    assert max(relative_errors(found[:2], [loss.detach(), gradient])) <= 1e-12


class Reader:
    """A reader like that of an embedding store: read-only float32 arrays."""

    dtype = "float32"

    def __init__(self, vectors: Tensor, shard_rows: int) -> None:
        self.vectors, self.shard_rows = vectors.float().numpy(), shard_rows
        self.vectors.flags.writeable = False
        self.rows, self.dim = self.vectors.shape

    def shards(self) -> Iterator[tuple[int, Any]]:
        for first in range(0, self.rows, self.shard_rows):
            yield first, self.vectors[first : first + self.shard_rows]


@pytest.mark.parametrize("workspace_mib", [0.001, 64.0])
def test_a_reader_of_shards_equals_a_tensor(workspace_mib: float) -> None:
    batch = Batch.random(23, 31, masks=True, random_positive=False).rounded(torch.float32)
    options: dict[str, Any] = {"implementation": "chunked", "workspace_mib": workspace_mib}
    expected = step(batch, ("frozen",), 20.0, **options)
    found = step(batch, ("frozen",), 20.0, frozen=Reader(batch.frozen, 17), **options)
    assert max(relative_errors(found, expected)) <= 1e-12


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_embedding_store_is_a_reader(dtype: Any, tmp_path: Path) -> None:
    from index.passages import Passage
    from index.store.reader import EmbeddingStore
    from index.store.writer import EmbeddingWriter

    batch = Batch.random(23, 31, masks=True, random_positive=False).rounded(getattr(torch, dtype))
    passages = [Passage(str(number), "", "text") for number in range(len(batch.frozen))]
    with EmbeddingWriter(tmp_path, dim=12, model={"m": "m"}, source={}, dtype=dtype, shard_rows=17) as writer:
        writer.append(passages, batch.frozen.numpy().astype(dtype))
    expected = step(batch, ("frozen",), 20.0)
    found = step(batch, ("frozen",), 20.0, frozen=EmbeddingStore.open(tmp_path), workspace_mib=0.001)
    assert max(relative_errors(found, expected)) <= 1e-12


def test_a_reader_that_announces_other_rows_is_refused() -> None:
    batch = Batch.random(5, 5, masks=False, random_positive=False)
    reader = Reader(batch.frozen, 17)
    reader.rows += 1
    with pytest.raises(ValueError, match="announced 42 rows, found 41"):
        step(batch, ("frozen",), 20.0, frozen=reader)


@pytest.mark.parametrize("source", ["own", "frozen"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("implementation", ["full", "chunked"])
def test_a_value_that_is_not_finite_gives_a_loss_that_is_not(implementation: str, bad: float, source: str) -> None:
    batch = Batch.random(9, 9, masks=False, random_positive=False)
    getattr(batch, source)[1, 2] = bad
    assert not step(batch, (source,), 20.0, implementation=implementation)[0].isfinite()


def test_upstream_gradients_of_both_signs_scale_all_gradients() -> None:
    batch = Batch.random(19, 23, masks=True, random_positive=False)
    one = step(batch, SOURCES, 20.0, symmetric=True, upstream=1.0)
    for upstream in (-2.0, 0.0, 1e-30):
        other = step(batch, SOURCES, 20.0, symmetric=True, upstream=upstream)
        for a, b in zip(one[1:], other[1:], strict=True):
            torch.testing.assert_close(upstream * a, b, rtol=1e-9, atol=1e-12 * abs(upstream))


def test_gradients_that_are_not_asked_for_are_not_needed() -> None:
    batch = Batch.random(19, 23, masks=False, random_positive=False)
    negatives = Negatives(own=Ragged(batch.own, batch.offsets), frozen=batch.frozen, same_side=True)
    leaves = [batch.query, batch.passage, torch.tensor(20.0, dtype=torch.float64)]
    truth = step(batch, SOURCES, 20.0, symmetric=True, upstream=1.0)
    for place in range(3):
        given = [leaf.clone().requires_grad_(number == place) for number, leaf in enumerate(leaves)]
        loss = inf_cl_loss(*given[:2], logit_scale=given[2], negatives=negatives, symmetric=True)
        (gradient,) = torch.autograd.grad(loss, given[place])
        torch.testing.assert_close(gradient, truth[1 + place])
    with torch.no_grad():
        torch.testing.assert_close(
            inf_cl_loss(*leaves[:2], logit_scale=leaves[2], negatives=negatives, symmetric=True), truth[0]
        )


def test_the_module_takes_negatives() -> None:
    batch = Batch.random(9, 9, masks=False, random_positive=False)
    negatives = Negatives(frozen=batch.frozen)
    found = InfCLLoss(logit_scale=5.0)(batch.query.float(), batch.passage.float(), negatives=negatives)
    expected = step(batch, ("frozen",), 5.0)[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_invalid_negatives_are_refused_by_name() -> None:
    batch = Batch.random(5, 7, masks=False, random_positive=False)
    own, offsets, frozen = batch.own, batch.offsets, batch.frozen
    pair = torch.tensor([[0, 0]])
    cases: list[tuple[Any, str]] = [
        ("none", "negatives must be a Negatives, found str"),
        (Negatives(same_side=1), "negatives.same_side must be True or False"),  # type: ignore[arg-type]
        (Negatives(own=own), "negatives.own must be losses.Ragged, found Tensor"),  # type: ignore[arg-type]
        (Negatives(own=Ragged(own[0], offsets)), "negatives.own.values must be a matrix"),
        (Negatives(own=Ragged(own[:, :-1], offsets)), "negatives.own.values has 11 dimensions, query has 12"),
        (Negatives(own=Ragged(own.float(), offsets)), "negatives.own.values is torch.float32, query is torch.float64"),
        (Negatives(own=Ragged(own, offsets.double())), "negatives.own.offsets must be a tensor of int64"),
        (Negatives(own=Ragged(own, offsets[:-1])), r"negatives.own.offsets must have shape \[6\], found \[5\]"),
        (Negatives(own=Ragged(own, offsets + 1)), "negatives.own.offsets must begin with 0"),
        (Negatives(own=Ragged(own[:-1], offsets)), "negatives.own.offsets must begin with 0 and end with"),
        (Negatives(own=Ragged(own[:2], torch.tensor([0, 2, 1, 2, 2, 2]))), "must not decrease, found 1 at 2"),
        (Negatives(frozen=frozen[0]), "negatives.frozen must be a matrix"),
        (Negatives(frozen=frozen.long()), "negatives.frozen must be float32"),
        (Negatives(frozen=frozen[:, :-1]), "negatives.frozen has 11 dimensions, query has 12"),
        (Negatives(frozen=frozen.clone().requires_grad_()), "negatives.frozen gets no gradient"),
        (Negatives(frozen="store"), "negatives.frozen must be a tensor .* or a reader"),
        (Negatives(frozen_excluded=pair), "negatives.frozen_excluded needs negatives.frozen"),
        (Negatives(frozen=frozen, frozen_excluded=pair[0]), r"negatives.frozen_excluded must have shape \[pairs, 2\]"),
        (Negatives(frozen=frozen, frozen_excluded=pair.float()), "negatives.frozen_excluded must be a tensor of int64"),
        (Negatives(frozen=frozen, frozen_excluded=pair + 5), r"5 queries and 41 frozen passages, found \[5, 5\]"),
    ]
    for negatives, message in cases:
        with pytest.raises(ValueError, match=f"^.*{message}"):
            inf_cl_loss(batch.query, batch.passage, logit_scale=5.0, negatives=negatives)


def test_what_cannot_be_combined_is_refused_by_name() -> None:
    batch = Batch.random(5, 7, masks=False, random_positive=False)
    with pytest.raises(ValueError, match="'dense' does not support negatives"):
        step(batch, ("frozen", "same_side"), 5.0, torch.float32, implementation="dense")
    query = batch.query.clone().requires_grad_()
    loss = inf_cl_loss(query, batch.passage, logit_scale=5.0, negatives=Negatives(frozen=batch.frozen))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_the_compiler_leaves_the_loss_out_of_its_graph() -> None:
    batch = Batch.random(5, 7, masks=False, random_positive=False)

    def doubled(query: Tensor) -> Tensor:
        negatives = Negatives(frozen=batch.frozen, same_side=True)
        return 2 * inf_cl_loss(2 * query, batch.passage, logit_scale=5.0, negatives=negatives)

    query = batch.query.clone().requires_grad_()
    expected, found = (call(query) for call in (doubled, torch.compile(doubled, backend="aot_eager")))
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, query), torch.autograd.grad(expected, query), strict=True):
        torch.testing.assert_close(one, other)


def test_no_negatives_is_the_plain_loss() -> None:
    batch = Batch.random(5, 7, masks=False, random_positive=False)
    plain = inf_cl_loss(batch.query, batch.passage, logit_scale=5.0)
    assert torch.equal(inf_cl_loss(batch.query, batch.passage, logit_scale=5.0, negatives=Negatives()), plain)
    empty = SimpleNamespace(rows=0, dim=12, shards=lambda: iter(()))
    for nothing in (
        Negatives(own=Ragged(batch.own[:0], torch.zeros(6).long())),
        Negatives(frozen=batch.frozen[:0]),
        Negatives(frozen=empty),
    ):
        for implementation in ("full", "chunked"):
            found = inf_cl_loss(
                batch.query, batch.passage, logit_scale=5.0, negatives=nothing, implementation=implementation
            )
            torch.testing.assert_close(found, plain)
