"""Attention over packed sequences equals attention of each text: values, gradients and dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever.models.packed import attention
from retriever.models.packed.attention import PackedLayout, packed_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

CASES = [
    # heads, key heads, width, causal, window, lengths
    (2, 2, 16, False, None, [3, 1, 70, 10, 40]),
    (4, 2, 24, True, None, [5, 65, 2]),
    (2, 1, 32, False, 5, [50, 7, 30]),
    (2, 2, 64, True, 9, [40, 40]),
    (1, 1, 8, False, None, [1]),
]


def tensors(heads: int, key_heads: int, width: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, count, width, generator=generator).to(DEVICE, dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


def results(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def errors(case: tuple, dtype: torch.dtype) -> list[float]:
    heads, key_heads, width, causal, window, lengths = case
    inputs = tensors(heads, key_heads, width, sum(lengths), dtype)
    layout = PackedLayout.of(np.array(lengths)).to(DEVICE)
    settings = {"scale": width**-0.5, "causal": causal, "window": window}
    found = results(packed_attention(*inputs, layout, **settings), inputs)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    out = attention._reference_attention(*exact, layout, settings["scale"], 0.0, causal, window)
    expected = results(out, exact)
    # A text of one token has no gradient in query and key.
    return [float((f.double() - e).norm() / max(e.norm(), 1)) for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_attention_of_each_text(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert max(errors(case, torch.float32)) < 1e-6
    assert max(errors(case, torch.float16)) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", [*CASES, (12, 12, 64, False, None, list(range(1, 253, 3))), (4, 1, 128, True, None, [700, 3])]
)
def test_kernels_equal_attention_of_each_text_on_a_gpu(case: tuple, dtype: torch.dtype) -> None:
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert max(errors(case, dtype)) < bound


def weights_of(tokens: int, dropout: float, layout: PackedLayout, seed: int) -> Tensor:
    """Return the attention weights [tokens, tokens]: the output if the values are unit vectors."""
    query, key = (torch.zeros(tokens, 1, tokens, device=DEVICE) for _ in range(2))
    torch.manual_seed(seed)
    values = torch.eye(tokens, device=DEVICE)[:, None]
    return packed_attention(query, key, values, layout, scale=1.0, dropout=dropout)[:, 0]


def test_dropout_has_the_requested_rate_and_keeps_the_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layout = PackedLayout.of(np.array([60, 4])).to(DEVICE)
    text = weights_of(64, 0.25, layout, 0)[:60, :60] * 60
    assert torch.equal(text, weights_of(64, 0.25, layout, 0)[:60, :60] * 60)
    assert not torch.equal(text, weights_of(64, 0.25, layout, 1)[:60, :60] * 60)
    torch.testing.assert_close(text.unique(), torch.tensor([0.0, 4 / 3], device=DEVICE))
    # Three standard deviations of 3,600 draws are 0.022. Rows and columns of 60 differ from each other.
    assert abs(float((text > 0).float().mean()) - 0.75) < 0.022
    assert float((text > 0).float().mean(0).min()) > 0.5 and float((text > 0).float().mean(1).min()) > 0.5


def test_gradients_use_the_same_dropout_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lengths, dropout = [20, 12], 0.3
    layout = PackedLayout.of(np.array(lengths)).to(DEVICE)
    query, key, value = tensors(1, 1, 32, 32)
    torch.manual_seed(5)
    found = results(packed_attention(query, key, value, layout, scale=0.2, dropout=dropout), [query, key, value])

    kept = weights_of(32, dropout, layout, 5) > 0
    exact = [each.detach().double().requires_grad_() for each in (query, key, value)]
    q, k, v = (each[:, 0] for each in exact)
    text = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)).to(DEVICE)
    scores = (0.2 * q @ k.T).masked_fill(text[:, None] != text, -torch.inf)
    weights = torch.where(kept, scores.softmax(1) / (1 - dropout), 0.0)
    for one, other in zip(found, results((weights @ v)[:, None], exact), strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-6
