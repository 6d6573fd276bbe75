"""Triton kernels for attention over packed sequences, made for many short texts.

Token i attends to the tokens j of its own text, first[i] <= j < end[i]:

    S = scale · Q Kᵀ,  P = softmax(S),  O = dropout(P) V
    dV = dropout(P)ᵀ dO,  dS = P ∘ (dropout(dO Vᵀ) − rowsum(dO ∘ O)),  dQ = scale · dS K,  dK = scale · dSᵀ Q

The algorithm is FlashAttention-2 (Dao, arXiv 2307.08691), except that a tile holds consecutive tokens of any texts,
while FlashAttention starts a new tile for every text. Texts of ten tokens thus fill a tile of 64 rows, not a sixth of
it. Backward uses O and lse, the base-2 logarithm of each row's sum of exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# By default Triton compiles a second version of a kernel for integers that are divisible by 16. For `tokens` this would
# stop a run for some seconds at its first such micro-batch, without any gain in speed; hence `do_not_specialize`.


@triton.jit
def dropout_mask(rows, columns, stream, dropout):
    """True where dropout keeps an entry: a hash of `stream` (uint32), row and column, equal in all kernels.

    The hash is hash-prospector's lowbias32, an eighth of the work of Philox.
    """
    x = rows.to(tl.uint32) * 0x9E3779B1 + columns.to(tl.uint32) * 0x85EBCA77 + stream
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x.to(tl.float32) >= dropout * 4294967296.0


@triton.jit
def stream_of(seed_ptr, head):
    """Return the random stream of one head, for `dropout_mask`."""
    return tl.load(seed_ptr).to(tl.uint32) + head.to(tl.uint32) * 0xC2B2AE3D


@triton.jit
def attention_mask(rows, columns, first, end, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """True where a row attends to a column; shapes are broadcast."""
    inside = (columns >= first) & (columns < end)
    if CAUSAL:
        inside &= columns <= rows
    if WINDOW >= 0:
        inside &= (columns >= rows - WINDOW) & (columns <= rows + WINDOW)
    return inside


@triton.jit
def head_tile(ptr, rows, head, row_stride, head_stride, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows [rows, BLOCK_D] of one head; zeros beyond the last token and the last dimension."""
    dims = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * row_stride + head * head_stride + dims[None, :]
    return tl.load(ptr + offsets, mask=(rows < tokens)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def store_head_tile(ptr, rows, head, tile, tokens, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows of one head into a contiguous [tokens, HEADS, D]."""
    dims = tl.arange(0, BLOCK_D)
    offsets = (rows.to(tl.int64) * HEADS + head)[:, None] * D + dims[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=(rows < tokens)[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    first_ptr,
    end_ptr,
    seed_ptr,
    tokens,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    scale,
    dropout,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of BLOCK_M queries of one head: out [tokens, HEADS, D], lse float32 [HEADS, tokens]."""
    top, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows = top + tl.arange(0, BLOCK_M)
    first = tl.load(first_ptr + rows, mask=rows < tokens, other=tokens)
    end = tl.load(end_ptr + rows, mask=rows < tokens, other=0)
    low, high = tl.min(first), tl.max(end)
    if CAUSAL:
        high = tl.minimum(high, top + BLOCK_M)
    if WINDOW >= 0:
        low, high = tl.maximum(low, top - WINDOW), tl.minimum(high, top + BLOCK_M + WINDOW)
    q = head_tile(q_ptr, rows, head, q_row, q_head, tokens, D, BLOCK_D)
    stream = stream_of(seed_ptr, head)
    biggest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for left in range(low, high, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        k = head_tile(k_ptr, columns, head // GROUP, k_row, k_head, tokens, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRODUCT) * (scale * LOG2_E)
        inside = attention_mask(rows[:, None], columns[None, :], first[:, None], end[:, None], CAUSAL, WINDOW)
        scores = tl.where(inside, scores, -float("inf"))
        bigger = tl.maximum(biggest, tl.max(scores, 1))
        # The maximum of a row that has attended to no column so far is -inf.
        shift = tl.where(bigger == -float("inf"), 0.0, bigger)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(biggest - shift)
        total = total * fade + tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(dropout_mask(rows[:, None], columns[None, :], stream, dropout), weights, 0.0)
        v = head_tile(v_ptr, columns, head // GROUP, v_row, v_head, tokens, D, BLOCK_D)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRODUCT)
        biggest = bigger
    # Rows beyond the last token have a sum of 0.
    total = tl.where(rows < tokens, total, 1.0)
    mixed = mixed / (total * (1.0 - dropout))[:, None]
    store_head_tile(out_ptr, rows, head, mixed, tokens, HEADS, D, BLOCK_D)
    tl.store(lse_ptr + head.to(tl.int64) * tokens + rows, biggest + tl.log2(total), mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens"])
def backward_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    out_grad_ptr,
    lse_ptr,
    delta_ptr,
    q_grad_ptr,
    first_ptr,
    end_ptr,
    seed_ptr,
    tokens,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    scale,
    dropout,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of BLOCK_M queries: dQ [tokens, HEADS, D], and delta = rowsum(dO ∘ O), float32 [HEADS, tokens]."""
    top, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows = top + tl.arange(0, BLOCK_M)
    first = tl.load(first_ptr + rows, mask=rows < tokens, other=tokens)
    end = tl.load(end_ptr + rows, mask=rows < tokens, other=0)
    low, high = tl.min(first), tl.max(end)
    if CAUSAL:
        high = tl.minimum(high, top + BLOCK_M)
    if WINDOW >= 0:
        low, high = tl.maximum(low, top - WINDOW), tl.minimum(high, top + BLOCK_M + WINDOW)
    q = head_tile(q_ptr, rows, head, q_row, q_head, tokens, D, BLOCK_D)
    out = head_tile(out_ptr, rows, head, HEADS * D, D, tokens, D, BLOCK_D)
    out_grad = head_tile(out_grad_ptr, rows, head, HEADS * D, D, tokens, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * out_grad.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * tokens + rows, delta, mask=rows < tokens)
    lse = tl.load(lse_ptr + head.to(tl.int64) * tokens + rows, mask=rows < tokens, other=0.0)
    stream = stream_of(seed_ptr, head)
    q_grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for left in range(low, high, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        k = head_tile(k_ptr, columns, head // GROUP, k_row, k_head, tokens, D, BLOCK_D)
        v = head_tile(v_ptr, columns, head // GROUP, v_row, v_head, tokens, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRODUCT) * (scale * LOG2_E)
        inside = attention_mask(rows[:, None], columns[None, :], first[:, None], end[:, None], CAUSAL, WINDOW)
        weights = tl.where(inside, tl.exp2(scores - lse[:, None]), 0.0)
        weight_grad = tl.dot(out_grad, tl.trans(v), input_precision=PRODUCT)
        if DROPOUT:
            keep = dropout_mask(rows[:, None], columns[None, :], stream, dropout)
            weight_grad = tl.where(keep, weight_grad / (1.0 - dropout), 0.0)
        score_grad = weights * (weight_grad - delta[:, None])
        q_grad += tl.dot(score_grad.to(k.dtype), k, input_precision=PRODUCT)
    store_head_tile(q_grad_ptr, rows, head, q_grad * scale, tokens, HEADS, D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens"])
def backward_key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_grad_ptr,
    lse_ptr,
    delta_ptr,
    k_grad_ptr,
    v_grad_ptr,
    first_ptr,
    end_ptr,
    seed_ptr,
    tokens,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    scale,
    dropout,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of BLOCK_N keys: dK and dV [tokens, HEADS / GROUP, D], summed over the GROUP query heads of a key."""
    left, key_head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    columns = left + tl.arange(0, BLOCK_N)
    # Queries and keys are the same tokens, so the bounds of the keys bound the queries.
    low = tl.min(tl.load(first_ptr + columns, mask=columns < tokens, other=tokens))
    high = tl.max(tl.load(end_ptr + columns, mask=columns < tokens, other=0))
    if CAUSAL:
        low = tl.maximum(low, left)
    if WINDOW >= 0:
        low, high = tl.maximum(low, left - WINDOW), tl.minimum(high, left + BLOCK_N + WINDOW)
    k = head_tile(k_ptr, columns, key_head, k_row, k_head, tokens, D, BLOCK_D)
    v = head_tile(v_ptr, columns, key_head, v_row, v_head, tokens, D, BLOCK_D)
    k_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        stream = stream_of(seed_ptr, head)
        for top in range(low, high, BLOCK_M):
            rows = top + tl.arange(0, BLOCK_M)
            first = tl.load(first_ptr + rows, mask=rows < tokens, other=tokens)
            end = tl.load(end_ptr + rows, mask=rows < tokens, other=0)
            lse = tl.load(lse_ptr + head.to(tl.int64) * tokens + rows, mask=rows < tokens, other=0.0)
            delta = tl.load(delta_ptr + head.to(tl.int64) * tokens + rows, mask=rows < tokens, other=0.0)
            q = head_tile(q_ptr, rows, head, q_row, q_head, tokens, D, BLOCK_D)
            out_grad = head_tile(out_grad_ptr, rows, head, HEADS * D, D, tokens, D, BLOCK_D)
            scores = tl.dot(k, tl.trans(q), input_precision=PRODUCT) * (scale * LOG2_E)
            inside = attention_mask(rows[None, :], columns[:, None], first[None, :], end[None, :], CAUSAL, WINDOW)
            weights = tl.where(inside, tl.exp2(scores - lse[None, :]), 0.0)
            weight_grad = tl.dot(v, tl.trans(out_grad), input_precision=PRODUCT)
            used = weights
            if DROPOUT:
                keep = dropout_mask(rows[None, :], columns[:, None], stream, dropout)
                used = tl.where(keep, weights / (1.0 - dropout), 0.0)
                weight_grad = tl.where(keep, weight_grad / (1.0 - dropout), 0.0)
            v_grad += tl.dot(used.to(v.dtype), out_grad, input_precision=PRODUCT)
            score_grad = weights * (weight_grad - delta[None, :])
            k_grad += tl.dot(score_grad.to(k.dtype), q, input_precision=PRODUCT)
    store_head_tile(k_grad_ptr, columns, key_head, k_grad * scale, tokens, HEADS // GROUP, D, BLOCK_D)
    store_head_tile(v_grad_ptr, columns, key_head, v_grad, tokens, HEADS // GROUP, D, BLOCK_D)
