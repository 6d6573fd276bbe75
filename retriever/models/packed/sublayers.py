"""The end of a BERT sublayer as one fused kernel: bias, dropout, residual, LayerNorm.

Between the matrix products of such a layer, a GPU spends its time reading and writing activations. As modules, these
steps take four passes over memory and one more for the gradient of the bias; the kernel takes one pass each way.
Forward and backward of BERT-base take 0.93 of the time (126k tokens on one H200). Where the kernel does not run (on a
CPU, under torch.compile, with mixed dtypes) the modules are used.
"""

from __future__ import annotations

import os
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# A row is held in registers.
MAX_WIDTH = 8192


def fuse_sublayers(encoder: nn.Module) -> None:
    """Replace `forward` of the modules that end a sublayer of a transformers encoder by the fused kernel.

    These are the modules whose children are exactly `dense`, `dropout` and `LayerNorm`: `BertSelfOutput`, `BertOutput`
    and their counterparts in RoBERTa, XLM-R, CamemBERT and MPNet.
    """
    for module in encoder.modules():
        if {name for name, _ in module.named_children()} == {"dense", "dropout", "LayerNorm"}:
            module.forward = types.MethodType(_forward, module)


def _forward(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """Compute `BertOutput.forward`, fused where possible."""
    dense, norm = module.dense, module.LayerNorm
    dropout = module.dropout.p if module.training else 0.0
    if dropout == 1 or not _fusible(dense, hidden_states, input_tensor, norm.weight, norm.bias):
        return norm(module.dropout(dense(hidden_states)) + input_tensor)
    hidden = linear(hidden_states, dense.weight)
    return residual_norm(hidden, dense.bias, input_tensor, norm.weight, norm.bias, eps=norm.eps, dropout=dropout)


def _fusible(dense: nn.Module, hidden: Tensor, *others: Tensor) -> bool:
    # An adapter may have replaced the dense layer.
    if torch.compiler.is_compiling() or type(dense) is not nn.Linear or dense.bias is None:
        return False
    dtypes = {each.dtype for each in (hidden, dense.weight, dense.bias, *others)}
    on_kernels = hidden.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return on_kernels and len(dtypes) == 1 and dense.out_features <= MAX_WIDTH and not torch.is_autocast_enabled("cuda")


def residual_norm(
    hidden: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, *, eps: float, dropout: float = 0.0
) -> Tensor:
    """Compute LayerNorm(residual + dropout(hidden + bias)), the end of a BERT sublayer.

    All tensors have the same dtype: float32, bfloat16 or float16. Statistics and sums are computed in float32.

    Args:
        hidden: [..., D], a matrix product without its bias.
        bias: [D], added to `hidden`.
        residual: [..., D], the input of the sublayer.
        weight: [D], the weight of the LayerNorm.
        shift: [D], the bias of the LayerNorm.
        eps: Constant that is added to the variance.
        dropout: Probability with which an entry is dropped, below 1. Random numbers come from the device's default
            generator. Default: 0.

    Returns:
        [..., D] in the dtype of `hidden`, differentiable once with respect to the five tensors.
    """
    # The seed stays on the device, so that the host does not synchronize.
    seed = torch.randint(2**31 - 1, (1,), device=hidden.device) if dropout else None
    saves = torch.is_grad_enabled()
    return _ResidualNorm.apply(hidden, bias, residual, weight, shift, seed, eps, dropout, saves)


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
        saves: bool,
    ) -> Tensor:
        from retriever.models.packed.sublayer_kernels import forward_kernel

        hidden, residual = hidden.contiguous(), residual.contiguous()
        width = hidden.shape[-1]
        tokens = hidden.numel() // width
        out = torch.empty_like(hidden)
        total = torch.empty_like(hidden) if saves else out
        mean, scale = hidden.new_empty(2, tokens if saves else 0, dtype=torch.float32)
        if tokens:
            forward_kernel[(tokens,)](
                *(hidden, bias, residual, weight, shift, out, total, mean, scale, bias if seed is None else seed),
                *(eps, dropout),
                **_shape(width),
                DROPOUT=dropout > 0,
                KEEP=saves,
            )
        if saves:
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
            # Number of rows that are prefetched. Wide rows do not fit in shared memory.
            STAGES=3 if width * total.element_size() <= 8192 else 1,
        )
        bias_grad, weight_grad, shift_grad = partial.sum(0).to(weight.dtype)
        return hidden_grad, bias_grad, residual_grad, weight_grad, shift_grad, None, None, None, None


# One row at a time, with one warp per 1024 elements. In backward, 8 programs per multiprocessor iterate over the rows.
# This was the fastest of 1 to 8 rows, 1 to 8 warps and 4 to 24 programs (one H200, D = 768).


def _shape(width: int) -> dict[str, int]:
    block = 1 << (width - 1).bit_length()
    return {"D": width, "BLOCK_D": block, "num_warps": max(1, block // 1024)}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count
