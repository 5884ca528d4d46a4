"""Attention that reads the stacked projection as it is and rotates on the way: one Triton kernel.

Online softmax over tiles of keys (Dao et al. 2022, "FlashAttention"). At a few hundred positions a query's attention is
bound by latency, and PyTorch's takes three launches for it: the rotation, a cleared buffer, and cuDNN's kernel, which
waits for the buffer. Only imported on CUDA: it needs triton, which comes with PyTorch's CUDA builds.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST_DOT = 16  # what Triton multiplies at least
CONFIGS = [
    triton.Config({"BLOCK_Q": queries, "BLOCK_K": keys}, num_warps=warps, num_stages=stages)
    for queries, keys, warps, stages in (
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 128, 4, 2),
        (32, 64, 4, 2),
        (128, 64, 8, 2),
    )
]


@triton.autotune(CONFIGS, key=["heads", "WIDTH", "CAUSAL"])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def _attention(  # type: ignore[no-untyped-def]
    qkv,
    cos,
    sin,
    out,
    length,
    heads,
    scale,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of queries of one head. A head's WIDTH channels are two parts, of LOW and of at most HIGH channels."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the longest first
    head, row = tl.program_id(1), tl.program_id(2)
    step = 3 * heads * WIDTH  # from a position to the next
    q_base = qkv + row.to(tl.int64) * length * step + head * WIDTH
    k_base, v_base = q_base + heads * WIDTH, q_base + 2 * heads * WIDTH
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    there = (queries < length)[:, None]
    inside = (high < WIDTH)[None, :]
    q1 = tl.load(q_base + queries[:, None] * step + low[None, :], mask=there, other=0.0)
    q2 = tl.load(q_base + queries[:, None] * step + high[None, :], mask=there & inside, other=0.0)
    if ROPE:  # of the pairs (i, i + LOW)
        c = tl.load(cos + queries[:, None] * WIDTH + low[None, :], mask=there, other=0.0).to(tl.float32)
        s = tl.load(sin + queries[:, None] * WIDTH + low[None, :], mask=there, other=0.0).to(tl.float32)
        x1, x2 = q1.to(tl.float32), q2.to(tl.float32)
        q1, q2 = (x1 * c - x2 * s).to(q1.dtype), (x2 * c + x1 * s).to(q2.dtype)
    most = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    y1 = tl.zeros([BLOCK_Q, LOW], tl.float32)
    y2 = tl.zeros([BLOCK_Q, HIGH], tl.float32)
    end = tl.minimum(length, (tile + 1) * BLOCK_Q) if CAUSAL else length
    for start in tl.range(0, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        seen = (keys < length)[:, None]
        k1 = tl.load(k_base + keys[:, None] * step + low[None, :], mask=seen, other=0.0)
        k2 = tl.load(k_base + keys[:, None] * step + high[None, :], mask=seen & inside, other=0.0)
        if ROPE:
            kc = tl.load(cos + keys[:, None] * WIDTH + low[None, :], mask=seen, other=0.0).to(tl.float32)
            ks = tl.load(sin + keys[:, None] * WIDTH + low[None, :], mask=seen, other=0.0).to(tl.float32)
            kx1, kx2 = k1.to(tl.float32), k2.to(tl.float32)
            k1, k2 = (kx1 * kc - kx2 * ks).to(k1.dtype), (kx2 * kc + kx1 * ks).to(k2.dtype)
        scores = tl.dot(q1, tl.trans(k1))
        scores = tl.dot(q2, tl.trans(k2), scores) * scale
        allowed = (keys < length)[None, :]
        if CAUSAL:
            allowed = allowed & (keys[None, :] <= queries[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        weights = tl.math.exp2(scores - highest[:, None])
        shrink = tl.math.exp2(most - highest)
        total = total * shrink + tl.sum(weights, 1)
        v1 = tl.load(v_base + keys[:, None] * step + low[None, :], mask=seen, other=0.0)
        v2 = tl.load(v_base + keys[:, None] * step + high[None, :], mask=seen & inside, other=0.0)
        p = weights.to(v1.dtype)
        y1 = tl.dot(p, v1, y1 * shrink[:, None])
        y2 = tl.dot(p, v2, y2 * shrink[:, None])
        most = highest
    o_base = out + row.to(tl.int64) * length * heads * WIDTH + head * WIDTH
    to = o_base + queries[:, None] * (heads * WIDTH)
    tl.store(to + low[None, :], (y1 / total[:, None]).to(out.dtype.element_ty), mask=there)
    tl.store(to + high[None, :], (y2 / total[:, None]).to(out.dtype.element_ty), mask=there & inside)


@torch.library.custom_op("rsd_trt::attention", mutates_args=())
def attention(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, causal: bool) -> Tensor:
    """Multi-head self-attention of qkv [B, S, 3, heads, width] -> [B, S, heads * width], in half precision.

    cos, sin: rotary tables [S, width], whose halves are equal, for queries and keys; None: not rotated. Scores and sums
    are float32; what is rotated is rounded once.
    """
    assert qkv.is_contiguous() and qkv.is_cuda
    batch, length, _, heads, width = qkv.shape
    low = 1 << (width - 1).bit_length() - 1  # the largest power of two below the width
    high = max(SMALLEST_DOT, 1 << (width - low - 1).bit_length())
    assert cos is None or 2 * low == width, f"heads of {width} channels cannot be rotated here"
    out = qkv.new_empty(batch, length, heads * width)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(length, meta["BLOCK_Q"]), heads, batch

    scale = math.log2(math.e) / math.sqrt(width)
    rope, causal_ = cos is not None, bool(causal)
    _attention[grid](qkv, cos, sin, out, length, heads, scale, width, low, high, rope, causal_)
    return out


@attention.register_fake
def _(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, causal: bool) -> Tensor:
    batch, length, _, heads, width = qkv.shape
    return qkv.new_empty(batch, length, heads * width)
