"""How a BERT-like layer's sublayers end, by a kernel: bias, dropout, residual, LayerNorm.

Between the matrix products of such a layer a GPU spends its time on reading and writing activations. As modules these
steps are four passes over memory, and one more for the gradient of the bias; as a kernel one each way: a forward and
backward of BERT-base takes 0.93 of the time (126k tokens on one H200). Where the kernel does not run (a CPU, a compiler
that fuses by itself, mixed dtypes) the modules do what they did.
"""

from __future__ import annotations

import os
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# A row is held in registers.
WIDEST = 8192


def fuse_sublayers(encoder: nn.Module) -> None:
    """Have the modules of a transformers encoder that end a sublayer use the kernel.

    They are known by what they are made of: `dense`, `dropout` and `LayerNorm`, as in `BertSelfOutput` and `BertOutput`
    and in those of RoBERTa, XLM-R, CamemBERT and MPNet.
    """
    for module in encoder.modules():
        if {name for name, _ in module.named_children()} == {"dense", "dropout", "LayerNorm"}:
            module.forward = types.MethodType(_forward, module)


def _forward(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """As `BertOutput.forward`."""
    dense, norm = module.dense, module.LayerNorm
    dropout = module.dropout.p if module.training else 0.0
    if dropout == 1 or not _fusible(dense, hidden_states, input_tensor, norm.weight, norm.bias):
        return norm(module.dropout(dense(hidden_states)) + input_tensor)
    hidden = linear(hidden_states, dense.weight)
    return residual_norm(hidden, dense.bias, input_tensor, norm.weight, norm.bias, eps=norm.eps, dropout=dropout)


def _fusible(dense: nn.Module, hidden: Tensor, *others: Tensor) -> bool:
    # An adapter may have taken the dense layer's place.
    if torch.compiler.is_compiling() or type(dense) is not nn.Linear or dense.bias is None:
        return False
    dtypes = {each.dtype for each in (hidden, dense.weight, dense.bias, *others)}
    on_kernels = hidden.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return on_kernels and len(dtypes) == 1 and dense.out_features <= WIDEST and not torch.is_autocast_enabled("cuda")


def residual_norm(
    hidden: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, *, eps: float, dropout: float = 0.0
) -> Tensor:
    """LayerNorm(residual + dropout(hidden + bias)) of each row, with `weight` and `shift`, as BERT's sublayers end.

    Args:
        hidden: [..., D], of float32, bfloat16 or float16; a product without its bias.
        bias: [D], as `weight` and `shift`; all of one dtype.
        residual: as `hidden`.
        eps: added to the variance.
        dropout: part that is left out, below 1; drawn from the device's generator.

    Returns:
        As `hidden`; differentiable once in the five tensors. Statistics and sums are float32.
    """
    # A scalar on the device, so that the host does not wait.
    seed = torch.randint(2**31 - 1, (1,), device=hidden.device) if dropout else None
    kept = torch.is_grad_enabled()
    return _ResidualNorm.apply(hidden, bias, residual, weight, shift, seed, eps, dropout, kept)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        shift: Tensor,
        seed: Tensor | None,
        eps: float,
        dropout: float,
        kept: bool,
    ) -> Tensor:
        from retriever.models.packed.sublayer_kernels import forward_kernel

        hidden, residual = hidden.contiguous(), residual.contiguous()
        width = hidden.shape[-1]
        tokens = hidden.numel() // width
        out = torch.empty_like(hidden)
        total = torch.empty_like(hidden) if kept else out
        mean, scale = hidden.new_empty(2, tokens if kept else 0, dtype=torch.float32)
        if tokens:
            forward_kernel[(tokens,)](
                *(hidden, bias, residual, weight, shift, out, total, mean, scale, bias if seed is None else seed),
                *(eps, dropout),
                **_shape(width),
                DROPOUT=dropout > 0,
                KEEP=kept,
            )
        if kept:
            ctx.save_for_backward(total, mean, scale, weight, seed)
            ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        from retriever.models.packed.sublayer_kernels import backward_kernel

        total, mean, scale, weight, seed = ctx.saved_tensors
        out_grad = out_grad.contiguous()
        width, tokens = total.shape[-1], len(mean)
        residual_grad = torch.empty_like(total)
        hidden_grad = residual_grad if seed is None else torch.empty_like(total)
        programs = _programs(total.device)
        partial = mean.new_empty(programs, 3, width)
        backward_kernel[(programs,)](
            *(out_grad, total, mean, scale, weight, hidden_grad, residual_grad, partial),
            *(mean if seed is None else seed, tokens, ctx.dropout),
            **_shape(width),
            DROPOUT=seed is not None,
            # Rows on their way while one is worked on, for which wide ones have no room.
            STAGES=3 if width * total.element_size() <= 8192 else 1,
        )
        bias_grad, weight_grad, shift_grad = partial.sum(0).to(weight.dtype)
        return hidden_grad, bias_grad, residual_grad, weight_grad, shift_grad, None, None, None, None


# A row at a time, by one warp for each 1024 numbers, and 8 programs for each multiprocessor that walk over all rows in
# backward: of 1 to 8 rows, 1 to 8 warps and 4 to 24 programs the fastest (one H200, D = 768).


def _shape(width: int) -> dict[str, int]:
    block = 1 << (width - 1).bit_length()
    return {"D": width, "BLOCK_D": block, "num_warps": max(1, block // 1024)}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count
