"""The ends of a BERT-like layer's sublayers by kernels: bias, dropout, residual and LayerNorm; bias and GELU.

Between the matrix products of such a layer a GPU spends its time on reading and writing activations. As modules these
steps are four and two passes over memory, with one more for the gradient of each bias; as kernels one each. Where the
kernels do not run (a CPU, a compiler that fuses by itself, mixed dtypes) the modules do what they did.
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
    """Have the modules of a transformers encoder that end in dropout, residual and LayerNorm, or in GELU, use kernels.

    They are known by what they are made of: `dense`, `dropout` and `LayerNorm`, as in BERT's `BertOutput`, or `dense`
    and `intermediate_act_fn`, as in its `BertIntermediate`; RoBERTa, XLM-R, CamemBERT and MPNet have the same.
    """
    for module in encoder.modules():
        parts = dict(module.named_children())
        if set(parts) == {"dense", "LayerNorm", "dropout"}:
            module.forward = types.MethodType(_dense_residual_norm, module)
        elif set(parts) == {"dense", "intermediate_act_fn"} and _is_gelu(parts["intermediate_act_fn"]):
            module.forward = types.MethodType(_dense_gelu, module)


def _is_gelu(activation: nn.Module) -> bool:
    """Whether it is the GELU by the error function, not one of its approximations."""
    from transformers.activations import ACT2FN

    return type(activation) is type(ACT2FN["gelu"])


def _dense_residual_norm(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    dense, norm = module.dense, module.LayerNorm
    dropout = module.dropout.p if module.training else 0.0
    if not _fusible(dense, hidden_states, input_tensor, norm.weight, norm.bias) or dropout == 1:
        return norm(module.dropout(dense(hidden_states)) + input_tensor)
    hidden = linear(hidden_states, dense.weight)
    return residual_norm(hidden, dense.bias, input_tensor, norm.weight, norm.bias, eps=norm.eps, dropout=dropout)


def _dense_gelu(module: Any, hidden_states: Tensor) -> Tensor:
    dense = module.dense
    if not _fusible(dense, hidden_states):
        return module.intermediate_act_fn(dense(hidden_states))
    return bias_gelu(linear(hidden_states, dense.weight), dense.bias)


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


def bias_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """gelu(hidden + bias) by the error function: [..., D] and [D] of one dtype in; differentiable once."""
    return _BiasGelu.apply(hidden, bias)


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
        from retriever.padding_free.sublayer_kernels import norm_forward_kernel

        hidden, residual = hidden.contiguous(), residual.contiguous()
        width = hidden.shape[-1]
        tokens = hidden.numel() // width
        out = torch.empty_like(hidden)
        total = torch.empty_like(hidden) if kept else out
        mean, scale = hidden.new_empty(2, tokens if kept else 0, dtype=torch.float32)
        shape = _shape("norm_forward", width)
        if tokens:
            norm_forward_kernel[(-(-tokens // shape["ROWS"]),)](
                *(hidden, bias, residual, weight, shift, out, total, mean, scale, bias if seed is None else seed),
                *(tokens, eps, dropout),
                **shape,
                DROPOUT=dropout > 0,
                KEEP=kept,
            )
        if kept:
            ctx.save_for_backward(total, mean, scale, weight, seed)
            ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        from retriever.padding_free.sublayer_kernels import norm_backward_kernel

        total, mean, scale, weight, seed = ctx.saved_tensors
        out_grad = out_grad.contiguous()
        width, tokens = total.shape[-1], len(mean)
        residual_grad = torch.empty_like(total)
        hidden_grad = residual_grad if seed is None else torch.empty_like(total)
        programs = _programs("norm_backward", total.device)
        partial = mean.new_empty(programs, 3, width)
        norm_backward_kernel[(programs,)](
            *(out_grad, total, mean, scale, weight, hidden_grad, residual_grad, partial),
            *(mean if seed is None else seed, tokens, ctx.dropout),
            **_shape("norm_backward", width),
            DROPOUT=seed is not None,
        )
        bias_grad, weight_grad, shift_grad = partial.sum(0).to(weight.dtype)
        return hidden_grad, bias_grad, residual_grad, weight_grad, shift_grad, None, None, None, None


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor) -> Tensor:
        from retriever.padding_free.sublayer_kernels import gelu_forward_kernel

        hidden = hidden.contiguous()
        width = hidden.shape[-1]
        tokens = hidden.numel() // width
        out = torch.empty_like(hidden)
        if tokens:
            shape = _shape("gelu_forward", width)
            grid = (-(-tokens // shape["ROWS"]), -(-width // shape["BLOCK_D"]))
            gelu_forward_kernel[grid](hidden, bias, out, tokens, **shape)
        ctx.save_for_backward(hidden, bias)
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, Tensor]:
        from retriever.padding_free.sublayer_kernels import gelu_backward_kernel

        hidden, bias = ctx.saved_tensors
        width = hidden.shape[-1]
        hidden_grad = torch.empty_like(hidden)
        shape = _shape("gelu_backward", width)
        blocks = -(-width // shape["BLOCK_D"])
        programs = -(-_programs("gelu_backward", hidden.device) // blocks)
        partial = hidden.new_empty(programs, width, dtype=torch.float32)
        gelu_backward_kernel[(programs, blocks)](
            *(out_grad.contiguous(), hidden, bias, hidden_grad, partial, hidden.numel() // width),
            **shape,
        )
        return hidden_grad, partial.sum(0).to(bias.dtype)


# Numbers of a tile, columns of GELU's tiles, warps, and programs for each multiprocessor that walk over all rows.
_SHAPES = {
    "norm_forward": (4096, 0, 4, 0),
    "norm_backward": (4096, 0, 4, 8),
    "gelu_forward": (4096, 512, 4, 0),
    "gelu_backward": (4096, 512, 4, 8),
}


def _shape(kernel: str, width: int) -> dict[str, int]:
    """A tile: as many rows of that width, or of a part of it, as its numbers allow."""
    numbers, columns, warps, _ = _SHAPES[kernel]
    columns = columns or 1 << (width - 1).bit_length()
    return {"D": width, "BLOCK_D": columns, "ROWS": max(1, numbers // columns), "num_warps": warps}


def _programs(kernel: str, device: torch.device) -> int:
    """Programs that walk over all rows, enough to fill the device."""
    if device.type != "cuda":
        return 2
    return _SHAPES[kernel][3] * torch.cuda.get_device_properties(device).multi_processor_count
