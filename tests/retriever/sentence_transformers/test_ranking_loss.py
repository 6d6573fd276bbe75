"""The losses equal those of sentence-transformers, mask equal texts, and the gradient cache is exact."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import LoadedPython
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import TrainerState

pytest.importorskip("datasets")
from ranking_loss_helpers import Tokens, end_to_end, padded, random_texts, scores_loss
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim

from retriever.sentence_transformers import CachedInfCLRankingLoss, InfCLRankingLoss
from retriever.sentence_transformers.duplicate_texts import duplicate_masks, text_hashes
from retriever.sentence_transformers.scale_checkpoint import LearnedScaleCallback

SYMMETRIC: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
letters = st.sampled_from("abcde")


class Identity(nn.Sequential):
    """A model whose features contain the embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7), columns=st.integers(2, 4), width=st.integers(1, 5), seed=st.integers(0, 99),
    scale=st.sampled_from([1.0, 20.0, 50.0]), symmetric=st.booleans(), similarity=st.sampled_from([cos_sim, dot_score]),
)  # fmt: skip
def test_value_and_gradients_equal_multiple_negatives_ranking_loss(
    rows: int, columns: int, width: int, seed: int, scale: float, symmetric: bool, similarity: Callable[..., Tensor]
) -> None:
    torch.manual_seed(seed)
    leaves = [torch.randn(rows, width, requires_grad=True) for _ in range(columns)]
    features = [{"sentence_embedding": leaf} for leaf in leaves]
    options: dict[str, Any] = {"scale": scale, "similarity_fct": similarity} | (SYMMETRIC if symmetric else {})
    theirs = MultipleNegativesRankingLoss(Identity(), **options)(features, None)
    ours = InfCLRankingLoss(Identity(), mask_duplicates=False, **options)(features, torch.zeros(rows))
    cached = CachedInfCLRankingLoss(Identity(nn.Identity()), mini_batch_size=3, mask_duplicates=False, **options)(
        features
    )
    allowed = {"rtol": 1e-5, "atol": 1e-5 * scale}
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached, theirs, rtol=1e-5, atol=1e-5)
    expected = gradients(theirs, *leaves)
    torch.testing.assert_close(gradients(ours, *leaves), expected, **allowed)
    torch.testing.assert_close(gradients(cached, *leaves), expected, **allowed)


@given(st.lists(st.lists(letters, min_size=4, max_size=4), min_size=1, max_size=5), st.integers(2, 4))
def test_passages_paired_with_a_query_text_are_masked(rows: list[list[str]], width: int) -> None:
    columns = list(zip(*(row[:width] for row in rows), strict=True))
    masks = duplicate_masks([torch.tensor([ord(text) for text in column]) for column in columns])
    masked = masks.query_ids[:, None] == masks.passage_ids
    masked[tuple(masks.excluded.T)] = True
    pairs = set(zip(columns[0], columns[1], strict=True))
    passages = [text for column in columns[1:] for text in column]
    for i, query in enumerate(columns[0]):
        expected = [(query, passage) in pairs for passage in passages]
        assert [*masked[i].tolist()] == expected
        assert [i, i] not in masks.excluded.tolist()


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=8))
def test_hashes_are_equal_if_and_only_if_token_ids_are(texts: list[list[int]]) -> None:
    hashes = text_hashes(padded(texts))
    assert torch.equal(hashes, text_hashes(padded(texts, left=True)))
    assert torch.equal(hashes, text_hashes(end_to_end(texts)))
    offsets = end_to_end(texts)["cu_seq_lens_q"][:-1]
    static = {"input_ids": torch.tensor([token for text in texts for token in text]), "offsets": offsets}
    assert torch.equal(hashes, text_hashes(static))
    assert (hashes[:, None] == hashes).tolist() == [[one == other for other in texts] for one in texts]


@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_texts_are_masked_unless_switched_off(symmetric: bool) -> None:
    columns = random_texts(4, 3)
    columns[2][0] = columns[1][0]  # a negative equal to its row's positive
    columns[1][3] = columns[1][1]  # two equal positives of different queries
    columns[0][2] = columns[0][0]  # two equal queries
    features, model = [padded(column) for column in columns], Tokens()
    options = SYMMETRIC if symmetric else {}
    embeddings = [model(column)["sentence_embedding"] for column in features]
    query, passage = (nn.functional.normalize(side, dim=1) for side in (embeddings[0], torch.cat(embeddings[1:])))
    scores = 20 * query @ passage.T
    for i, j in [(0, 4), (1, 3), (3, 1), (0, 2), (2, 0), (2, 4)]:
        scores[i, j] = -torch.inf
    expected = nn.functional.cross_entropy(scores, torch.arange(4))
    if symmetric:
        expected = (expected + nn.functional.cross_entropy(scores[:, :4].T, torch.arange(4))) / 2
    torch.testing.assert_close(InfCLRankingLoss(model, **options)(features), expected)
    torch.testing.assert_close(CachedInfCLRankingLoss(model, mini_batch_size=3, **options)(features), expected)
    off = InfCLRankingLoss(model, mask_duplicates=False, **options)(features)
    torch.testing.assert_close(off, scores_loss(embeddings, 20.0, symmetric))
    assert off > expected + 1e-3


@pytest.mark.parametrize("layout", [padded, end_to_end])
@pytest.mark.parametrize("size", [{"mini_batch_size": 2}, {"mini_batch_size": 50}, {"mini_batch_num_tokens": 9}])
def test_the_gradient_cache_is_exact_with_dropout_and_a_scaled_loss(layout: Any, size: dict[str, int]) -> None:
    columns, model = random_texts(7, 3), Tokens(dropout=0.4)
    loss = CachedInfCLRankingLoss(model, **size)
    parameters = [*model.parameters(), loss.infonce.log_logit_scale]
    most = size.get("mini_batch_num_tokens")

    def mini_batches(column: list[list[int]]) -> list[list[list[int]]]:
        batches: list[list[list[int]]] = [[]]
        for text in column:
            count = sum(map(len, batches[-1])) + len(text) if most else len(batches[-1]) + 1
            if batches[-1] and count > (most or size["mini_batch_size"]):
                batches.append([])
            batches[-1].append(text)
        return batches

    torch.manual_seed(3)
    embeddings = [
        torch.cat([model(layout(batch))["sentence_embedding"] for batch in mini_batches(column)]) for column in columns
    ]
    after = torch.rand(())
    expected = scores_loss(embeddings, loss.infonce.logit_scale)
    wanted = gradients(expected / 4, *parameters)
    torch.manual_seed(3)
    value = loss([layout(column) for column in columns])
    assert torch.equal(torch.rand(()), after)
    other = loss([layout(column) for column in random_texts(5, 2, seed=9)])
    found = gradients(value / 4, *parameters)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert other.requires_grad and wanted[-1].abs() > 1e-3
    with torch.no_grad():
        assert not loss([layout(column) for column in columns]).requires_grad


def test_second_passes_use_the_autocast_of_the_first() -> None:
    columns, model = [padded(column) for column in random_texts(6, 2)], Tokens()
    dtypes = []
    model[1].register_forward_hook(lambda *arguments: dtypes.append(arguments[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = CachedInfCLRankingLoss(model, mini_batch_size=2)(columns)
    loss.backward()
    assert dtypes == [torch.bfloat16] * 12


@pytest.mark.parametrize("kind", [InfCLRankingLoss, CachedInfCLRankingLoss])
def test_the_scale_is_learned_only_if_requested_and_is_clamped(kind: Any) -> None:
    columns, model = [padded(column) for column in random_texts(6, 2)], Tokens()
    fixed = kind(model, learn_scale=False)
    fixed(columns).backward()
    assert fixed.infonce.log_logit_scale.grad is None and fixed.scale == pytest.approx(20)
    limited = kind(model, scale=30.0, max_scale=30.0)
    with torch.no_grad():
        limited.infonce.log_logit_scale.add_(1)
    assert limited.scale == pytest.approx(30) and limited.temperature == pytest.approx(1 / 30)
    assert limited.get_config_dict()["scale"] == pytest.approx(30)
    torch.testing.assert_close(limited(columns), kind(model, scale=30.0)(columns))


@pytest.mark.parametrize("weights", [[1, 1], [1, 0.5]])
def test_both_losses_work_in_matryoshka_loss(weights: list[float]) -> None:
    columns, model = [padded(column) for column in random_texts(6, 3)], Tokens()
    model.get_embedding_dimension = lambda: 8
    embeddings = [model(column)["sentence_embedding"] for column in columns]
    log_scale = torch.tensor(20.0).log().requires_grad_()
    expected = sum(
        weight * scores_loss([each[:, :dim] for each in embeddings], log_scale.exp())
        for weight, dim in zip(weights, (8, 4), strict=True)
    )
    parameters = list(model.parameters())
    wanted = gradients(expected, *parameters, log_scale)
    for kind in (InfCLRankingLoss, CachedInfCLRankingLoss):
        learned = kind is InfCLRankingLoss or weights == [1, 1]
        loss = kind(model, learn_scale=learned)
        value = MatryoshkaLoss(model, loss, [8, 4], weights)(columns, None)
        torch.testing.assert_close(value, expected)
        found = gradients(value, *parameters, loss.infonce.log_logit_scale)
        torch.testing.assert_close(found, wanted if learned else [*wanted[:-1], torch.zeros(())], rtol=1e-4, atol=1e-6)
    if weights != [1, 1]:
        with pytest.raises(ValueError, match="learn_scale must be False"):
            MatryoshkaLoss(model, CachedInfCLRankingLoss(model), [8, 4], weights)(columns, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": ("query_to_doc", "doc_to_doc")}, "directions must be"),
        ({"directions": ("doc_to_query",)}, "directions must be"),
        ({"directions": ("query_to_doc", "doc_to_query")}, 'partition_mode must be "per_direction"'),
        ({"partition_mode": "other"}, "partition_mode must be .* found 'other'"),
        ({"similarity_fct": euclidean_sim}, "similarity_fct must be cos_sim or dot_score, found euclidean_sim"),
        ({"scale": 0.0}, "logit_scale must be"),
        ({"scale": 200.0}, "logit_scale must be"),
        ({"mask_duplicates": 1}, "mask_duplicates must be True or False"),
        ({"exchange": "mail"}, "exchange"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    for kind in (InfCLRankingLoss, CachedInfCLRankingLoss):
        with pytest.raises(ValueError, match=message):
            kind(Tokens(), **options)


@pytest.mark.parametrize("name", ["mini_batch_size", "mini_batch_num_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_mini_batch_sizes_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, found"):
        CachedInfCLRankingLoss(Tokens(), **{name: value})


def test_weighting_of_hard_negatives_is_refused_by_name() -> None:
    for kind in (InfCLRankingLoss, CachedInfCLRankingLoss):
        with pytest.raises(TypeError, match="hardness_mode"):
            kind(Tokens(), hardness_mode="hard_negatives")


@pytest.mark.parametrize("kind", [InfCLRankingLoss, CachedInfCLRankingLoss])
def test_unsupported_batches_are_refused(kind: Any) -> None:
    columns = [padded(column) for column in random_texts(6, 2)]
    with pytest.raises(ValueError, match="found 1 column"):
        kind(Tokens())(columns[:1])
    with pytest.raises(ValueError, match="expected 6, found 5"):
        kind(Tokens())([columns[0], {name: value[:5] for name, value in columns[1].items()}])
    with pytest.raises(ValueError, match="found a column of pixel_values: pass mask_duplicates=False"):
        kind(Tokens())([columns[0], {"pixel_values": torch.zeros(6, 3, 2, 2)}])


def test_ranks_compute_value_and_gradients_of_the_whole_batch() -> None:
    """Ranks have different numbers of rows, columns and mini-batches; DDP averages once per step."""
    with LoadedPython("sentence_transformers", "torch.nn.parallel", "losses") as python:
        done = python.run(Path(__file__).parents[1] / "ranking_loss_on_ranks.py")
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])  # noqa: S301
def test_checkpoints_contain_the_scale_of_a_copied_loss(again: Callable[[Any], Any]) -> None:
    loss = CachedInfCLRankingLoss(Tokens(), scale=30.0)
    copied = again(loss)
    callback, state = LearnedScaleCallback(), TrainerState()
    callback.on_train_begin(None, state, None, optimizer=torch.optim.SGD(copied.parameters()))
    assert callback.state()["attributes"]["log_logit_scales"] == [copied.infonce.log_logit_scale.item()]
    assert state.stateful_callbacks == {"LearnedScaleCallback": callback.state()}


def test_a_checkpoint_with_another_number_of_scales_is_refused() -> None:
    loss = InfCLRankingLoss(Tokens())
    saved = {"LearnedScaleCallback": {"args": {}, "attributes": {"log_logit_scales": [3.0, 4.0]}}}
    state = TrainerState(global_step=2, stateful_callbacks=saved)
    with pytest.raises(ValueError, match="the checkpoint has 2 learned scales, but the losses have 1"):
        LearnedScaleCallback().on_train_begin(None, state, None, optimizer=torch.optim.SGD(loss.parameters()))
