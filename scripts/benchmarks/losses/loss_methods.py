"""The losses that bench_loss.py measures: ours, those of other packages, the full matrix, and row chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from losses import Guide, NegativeLimit, Negatives, Positives, clip_loss, inf_cl_loss
from losses.precision import Precision, matmul_precision
from losses.sigmoid import sigmoid_loss
from losses.triton.launch import why_not_fused

Implementation = Literal["auto", "full", "chunked", "triton"]
ROW_CHUNK = 2048


class UnavailableError(Exception):
    """A method cannot run here. The message says why."""


@dataclass(frozen=True)
class Pairs:
    """Embeddings and scalars that require gradients.

    query, passage: [N, D] of one dtype; row i of each is a pair. logit_scale, logit_bias: 0-dim float32 (float64 with
    float64 embeddings).
    """

    query: Tensor
    passage: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    def leaves(self) -> tuple[Tensor, ...]:
        return self.query, self.passage, self.logit_scale, self.logit_bias


@dataclass(frozen=True)
class Found:
    """A loss and its gradients in the order of `Pairs.leaves`; None for a gradient that the method lacks."""

    loss: Tensor
    gradients: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed relative errors against float64."""

    loss: float
    gradient: float


EXCLUDED_PAIRS = 75008

BF16, TF32, FP32 = Tolerance(1e-4, 4e-3), Tolerance(1e-4, 5e-4), Tolerance(1e-6, 5e-6)


@dataclass(frozen=True)
class Method:
    """A method to compute a loss and its gradients.

    operands: dtype of the embeddings. largest: largest batch size to measure. tolerance: only for ours; errors of
    others are only reported. package: the package it comes from, if not this project. symmetric: whether both
    directions are computed; the sigmoid loss has only one. masks: which of `masks` it receives. dim_of: D must be a
    multiple of this. patient: measured even if it is slow.
    """

    name: str
    run: Callable[[Pairs], Found]
    kind: Literal["infonce", "sigmoid"] = "infonce"
    operands: torch.dtype = torch.bfloat16
    largest: int = 2**18
    tolerance: Tolerance | None = None
    package: str | None = None
    symmetric: bool = True
    masks: str = ""
    dim_of: int = 1
    patient: bool = False

    @property
    def products(self) -> int:
        """Matrix products of 2·N·N·D operations that count for TFLOP/s, whatever the method computes."""
        return 4 if self.kind == "infonce" else 3


def through_autograd(loss: Tensor, pairs: Pairs) -> Found:
    """The loss with its gradients, as in a training step."""
    return Found(loss.detach(), torch.autograd.grad(loss, pairs.leaves(), allow_unused=True))


def oracle(pairs: Pairs, kind: str, symmetric: bool, kinds: str) -> Found:
    """The reference in float64, on the values that the method receives."""
    wide = Pairs(*(leaf.detach().double().requires_grad_() for leaf in pairs.leaves()))
    if kind == "infonce":
        returned: Any = inf_cl_loss(
            wide.query,
            wide.passage,
            logit_scale=wide.logit_scale,
            symmetric=symmetric,
            implementation="full",
            **masks(*pairs.query.shape, pairs.query.device, kinds),
        )
        loss = loss_of(returned)
    else:
        logits = wide.logit_scale * (wide.query @ wide.passage.T) + wide.logit_bias
        sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
        loss = -logsigmoid(sign * logits).sum() / len(logits)
    return through_autograd(loss, wide)


@functools.cache
def masks(count: int, dim: int, device: torch.device, kinds: str) -> dict[str, Any]:
    """Arguments of our loss, for the words in `kinds`.

    "ids": a positive index, and ids that mask one passage of each query. "excluded": as many pairs as a batch of
    WordNet definitions has known positives that were not drawn (75,008 for 65,536 pairs), and at least one per query.
    "positives": the same pairs as further positives. "limit": share 0.95, as in NV-Retriever. "guide": unit vectors of
    the dimension of the loss, where a pair's cosine is about 0.2. "hardness": β = 1. "statistics".
    """
    words = kinds.split()
    found: dict[str, Any] = {}
    rows = torch.arange(count, device=device)
    if "ids" in words:
        found |= {"positive": rows, "passage_ids": rows // 2}
    generator = torch.Generator(device).manual_seed(count)
    size = (max(count, round(EXCLUDED_PAIRS * (count / 65536) ** 2)),)
    queries, steps = (torch.randint(low, count, size, device=device, generator=generator) for low in (0, 1))
    pairs = torch.stack([queries, (queries + steps) % count], 1)
    # Both together: each half of the pairs.
    if "excluded" in words:
        found["excluded"] = pairs[0::2] if "positives" in words else pairs
    if "positives" in words:
        known = pairs[1::2] if "excluded" in words else pairs
        if "excluded" in words:
            keys, excluded_keys = (rows[:, 0] * count + rows[:, 1] for rows in (known, found["excluded"]))
            known = known[~torch.isin(keys, excluded_keys)]
        found["positives"] = Positives(known)
    guide = None
    if "guide" in words:
        query, passage = (torch.randn(count, dim, device=device, generator=generator) for _ in range(2))
        query, passage = normalize(query, dim=1), normalize(passage, dim=1)
        passage = normalize(passage * 0.98 + 0.2 * query, dim=1)
        guide = Guide(query.bfloat16(), passage.bfloat16())
    limit = NegativeLimit(share=0.95) if "limit" in words else None
    if guide is not None or limit is not None or "hardness" in words:
        found["negatives"] = Negatives(limit=limit, guide=guide, hardness=float("hardness" in words))
    if "statistics" in words:
        found["statistics"] = True
    return found


def loss_of(returned: Any) -> Tensor:
    """The loss of what `inf_cl_loss` returns, with statistics or without."""
    return returned[0] if isinstance(returned, tuple) else returned


def ours(
    pairs: Pairs,
    implementation: Implementation,
    precision: Precision,
    mib: float,
    kinds: str = "",
) -> Found:
    """`inf_cl_loss` in both directions."""
    refuse_fallback(pairs, implementation)
    returned: Any = inf_cl_loss(
        pairs.query,
        pairs.passage,
        logit_scale=pairs.logit_scale,
        symmetric=True,
        implementation=implementation,
        precision=precision,
        workspace_mib=mib,
        **masks(*pairs.query.shape, pairs.query.device, kinds),
    )
    return through_autograd(loss_of(returned), pairs)


def ours_sigmoid(pairs: Pairs, implementation: Literal["chunked", "triton"], mib: float) -> Found:
    """`sigmoid_loss` in bf16."""
    refuse_fallback(pairs, implementation)
    loss = sigmoid_loss(
        pairs.query,
        pairs.passage,
        logit_scale=pairs.logit_scale,
        logit_bias=pairs.logit_bias,
        implementation=implementation,
        precision="bf16",
        workspace_mib=mib,
    )
    return through_autograd(loss, pairs)


def refuse_fallback(pairs: Pairs, implementation: str) -> None:
    """Raise an error if the named kernels cannot run, so that no other implementation is measured in their place."""
    reason = why_not_fused(pairs.query) if implementation == "triton" else None
    if reason is not None:
        raise UnavailableError(f"cannot run: {reason}")


def inf_cl(pairs: Pairs) -> Found:
    """The reference implementation of Inf-CL, one call per direction. Its `cal_inf_loss` does the same on one process
    but takes no learnable scale. float32 inputs avoid rounding logit_scale · query to bf16 before its kernels."""
    from inf_cl.flash import cal_flash_loss

    query, passage = pairs.query.float(), pairs.passage.float()
    rows = cal_flash_loss(query, passage, scale=pairs.logit_scale).mean()
    columns = cal_flash_loss(passage, query, scale=pairs.logit_scale).mean()
    return through_autograd((rows + columns) / 2, pairs)


def memeff(pairs: Pairs) -> Found:
    """The CLIP loss of memeff. Its temperature is a number without a gradient."""
    from memeff import MemoryEfficientCLIPLoss

    criterion = MemoryEfficientCLIPLoss(1 / host_value(pairs.logit_scale), normalized_inputs=True, stable=False)
    return through_autograd(criterion(pairs.query, pairs.passage), pairs)


def cut_cross_entropy(pairs: Pairs, filter_eps: str | None) -> Found:
    """Passages as the classifier, then queries. `filter_eps="auto"`, its default, skips blocks of small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    targets = torch.arange(len(pairs.query), device=pairs.query.device)
    query, passage = (side * pairs.logit_scale for side in (pairs.query, pairs.passage))
    rows = linear_cross_entropy(query, pairs.passage, targets, filter_eps=filter_eps)
    columns = linear_cross_entropy(passage, pairs.query, targets, filter_eps=filter_eps)
    return through_autograd((rows + columns) / 2, pairs)


def siglip_kernel(pairs: Pairs) -> Found:
    """The variant that siglip-kernel selects for bf16."""
    from siglip_kernel import fused_siglip_loss

    loss = fused_siglip_loss(pairs.query, pairs.passage, pairs.logit_scale.log(), pairs.logit_bias)
    return through_autograd(loss, pairs)


def full_matrix_tf32(pairs: Pairs) -> Found:
    """CLIP's loss as in its paper, in float32 with TF32 products."""
    with matmul_precision("tf32", pairs.query.device):
        return through_autograd(clip_loss(pairs.query, pairs.passage, logit_scale=pairs.logit_scale), pairs)


def full_matrix_autocast(pairs: Pairs) -> Found:
    """CLIP's loss in bf16 autocast: logits in bf16, softmax in float32."""
    with torch.autocast(pairs.query.device.type, torch.bfloat16):
        loss = clip_loss(pairs.query, pairs.passage, logit_scale=pairs.logit_scale)
    return through_autograd(loss, pairs)


def row_chunks(pairs: Pairs, both: bool) -> Found:
    """A cached loss (GradCache, arXiv 2101.06983): rows in chunks, each with its own backward, in bf16 autocast.

    Usually in one direction. With `both`, chunks of passages follow those of queries.
    """
    query, passage, scale, _ = pairs.leaves()
    total = torch.zeros((), device=query.device)
    sums = {id(side): torch.zeros_like(side, dtype=torch.float32) for side in (query, passage)}
    scale_sum = torch.zeros_like(scale)
    for side, other in ((query, passage), (passage, query))[: 2 if both else 1]:
        for first in range(0, len(side), ROW_CHUNK):
            chunk = side[first : first + ROW_CHUNK].detach().requires_grad_()
            with torch.autocast(query.device.type, torch.bfloat16):
                logits = scale * (chunk @ other.T)
                targets = torch.arange(first, first + len(chunk), device=query.device)
                loss = cross_entropy(logits, targets, reduction="sum") / (len(side) * (2 if both else 1))
            of_chunk, of_other, of_scale = torch.autograd.grad(loss, (chunk, other, scale))
            sums[id(side)][first : first + len(chunk)] += of_chunk
            sums[id(other)] += of_other
            scale_sum += of_scale
            total += loss.detach()
    return Found(total, (*(sums[id(side)].to(side.dtype) for side in (query, passage)), scale_sum, None))


@functools.cache
def host_value(scalar: Tensor) -> float:
    """Read a scalar once, so that methods which need a Python number do not synchronize at every call."""
    return scalar.item()


def methods(workspace_mib: float, open_mib: float) -> list[Method]:
    """All methods. `open_mib` is the workspace on a GPU with free memory."""

    def own(way: Implementation, precision: Precision) -> Callable[[Pairs], Found]:
        return functools.partial(ours, implementation=way, precision=precision, mib=workspace_mib)

    wide = torch.float32
    return [
        Method("ours, triton bf16", own("triton", "bf16"), tolerance=BF16, largest=2**20, patient=True),
        Method("ours, auto bf16", own("auto", "bf16"), tolerance=BF16, largest=2**13),
        open_workspace(open_mib),
        Method("ours, triton tf32", own("triton", "tf32"), operands=wide, tolerance=TF32),
        Method("ours, triton fp32", own("triton", "fp32"), operands=wide, tolerance=FP32),
        Method("ours, chunked bf16", own("chunked", "bf16"), tolerance=BF16),
        Method("ours, chunked fp32", own("chunked", "fp32"), operands=wide, tolerance=FP32),
        Method("ours, full fp32", own("full", "fp32"), operands=wide, tolerance=FP32),
        Method("inf-cl", inf_cl, package="inf-cl", dim_of=256),
        Method("memeff", memeff, package="memeff"),
        Method("cut-cross-entropy", functools.partial(cut_cross_entropy, filter_eps=None), package="cut-cross-entropy"),
        Method(
            "cut-cross-entropy, filtered",
            functools.partial(cut_cross_entropy, filter_eps="auto"),
            package="cut-cross-entropy",
        ),
        Method("full matrix, tf32", full_matrix_tf32, operands=wide),
        Method("full matrix, bf16 autocast", full_matrix_autocast),
        Method("row chunks, both directions", functools.partial(row_chunks, both=True)),
        Method("row chunks, one direction", functools.partial(row_chunks, both=False), symmetric=False),
        Method(
            "ours, sigmoid triton bf16",
            functools.partial(ours_sigmoid, implementation="triton", mib=workspace_mib),
            kind="sigmoid",
            tolerance=BF16,
            largest=2**20,
        ),
        open_workspace(open_mib, "sigmoid"),
        Method(
            "ours, sigmoid chunked bf16",
            functools.partial(ours_sigmoid, implementation="chunked", mib=workspace_mib),
            kind="sigmoid",
            tolerance=BF16,
        ),
        Method("siglip-kernel", siglip_kernel, kind="sigmoid", package="siglip-kernel", largest=2**20),
    ]


def open_workspace(mib: float, kind: Literal["infonce", "sigmoid"] = "infonce") -> Method:
    """Our kernels with a workspace of `mib` MiB, which is part of the name."""
    if kind == "sigmoid":
        run = functools.partial(ours_sigmoid, implementation="triton", mib=mib)
        return Method(f"ours, sigmoid triton bf16, {mib:g} MiB", run, kind=kind, tolerance=BF16)
    run = functools.partial(ours, implementation="triton", precision="bf16", mib=mib)
    return Method(f"ours, triton bf16, {mib:g} MiB", run, tolerance=BF16)


MASKS = {
    "positives and ids": "ids",
    "excluded pairs": "excluded",
    "ids and excluded pairs": "ids excluded",
    "further positives": "positives",
    "limit": "limit",
    "statistics": "statistics",
    "guide": "guide",
    "hardness": "hardness",
    "excluded pairs, further positives, limit": "excluded positives limit",
    "all of them": "ids excluded positives limit guide hardness statistics",
}
SMALL_MASKS = ("excluded pairs", "statistics")


def with_masks(mib: float) -> list[Method]:
    """Our kernels with each of MASKS."""
    return [masked("triton", mib, name, kinds) for name, kinds in MASKS.items()]


def with_small_masks(mib: float) -> list[Method]:
    """What "auto" chooses for small batches, without masks and with SMALL_MASKS."""
    plain = Method("ours, auto bf16", functools.partial(ours, implementation="auto", precision="bf16", mib=mib))
    some = [masked("auto", mib, name, MASKS[name]) for name in SMALL_MASKS]
    return [plain, *some, masked("auto", mib, " and ".join(SMALL_MASKS), "excluded statistics")]


def masked(implementation: Implementation, mib: float, name: str, kinds: str) -> Method:
    """Ours with the arguments `kinds` of `masks`."""
    run = functools.partial(ours, implementation=implementation, precision="bf16", mib=mib, kinds=kinds)
    return Method(f"ours, {implementation} bf16, {name}", run, tolerance=BF16, masks=kinds)
