"""Kernels in Triton: the towers' attention, and the gate of an MLP in E4M3. They need CUDA.

Called from what torch.compile compiles, they are launched like its own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsd_trt.models.fast.products import FP8, FP8_MAX, SMALLEST_MAX, power_of_two

ATTENTION_ROWS = 64  # queries, and keys, that are multiplied at a time
SMALLEST_DOT = 16  # the least inner width of a product
HEAD_WIDTHS = range(SMALLEST_DOT, 81)  # up to what every GPU's shared memory holds
BF16_CAPABILITY = (8, 0)  # of the first GPUs with matrix products in bfloat16
LOG2E = math.log2(math.e)


@triton.jit
def _attention(
    qkv,
    out,
    length,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1) % HEADS
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    TOKEN: tl.constexpr = 3 * HEADS * WIDTH  # numbers from a token to the next
    queries = qkv + image * length * TOKEN + head * WIDTH
    keys = queries + HEADS * WIDTH
    values = keys + HEADS * WIDTH
    # A head's width is a power of two and a rest, which is padded: 72 is 64 and 8.
    first, rest = tl.arange(0, FIRST), FIRST + tl.arange(0, max(REST, 1))
    within = rest < WIDTH
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < length
    q1 = tl.load(queries + rows[:, None] * TOKEN + first[None, :], real[:, None], 0.0)
    sum1 = tl.zeros([ROWS, FIRST], tl.float32)
    if REST > 0:
        q2 = tl.load(queries + rows[:, None] * TOKEN + rest[None, :], real[:, None] & within[None, :], 0.0)
        sum2 = tl.zeros([ROWS, REST], tl.float32)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, length, ROWS):
        columns = start + tl.arange(0, ROWS)
        seen = columns < length
        k1 = tl.load(keys + columns[None, :] * TOKEN + first[:, None], seen[None, :], 0.0)
        scores = tl.dot(q1, k1)
        if REST > 0:
            k2 = tl.load(keys + columns[None, :] * TOKEN + rest[:, None], seen[None, :] & within[:, None], 0.0)
            scores = tl.dot(q2, k2, scores)
        scores = tl.where(seen[None, :], scores * SCALE, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        most = higher
        rounded = weights.to(tl.bfloat16)
        v1 = tl.load(values + columns[:, None] * TOKEN + first[None, :], seen[:, None], 0.0)
        sum1 = tl.dot(rounded, v1, sum1 * shrink[:, None])
        if REST > 0:
            v2 = tl.load(values + columns[:, None] * TOKEN + rest[None, :], seen[:, None] & within[None, :], 0.0)
            sum2 = tl.dot(rounded, v2, sum2 * shrink[:, None])
    to = out + (image * length + rows[:, None]) * (HEADS * WIDTH) + head * WIDTH
    tl.store(to + first[None, :], (sum1 / total[:, None]).to(tl.bfloat16), real[:, None])
    if REST > 0:
        tl.store(to + rest[None, :], (sum2 / total[:, None]).to(tl.bfloat16), real[:, None] & within[None, :])


def can_attend(weight: Tensor, width: int) -> bool:
    """Whether `attend` takes heads of this width, from a product with this weight."""
    capability = torch.cuda.get_device_capability(weight.device)
    return weight.dtype == torch.bfloat16 and width in HEAD_WIDTHS and capability >= BF16_CAPABILITY


def attend(qkv: Tensor) -> Tensor:
    """Self-attention without a mask, bfloat16 qkv [B, S, 3, heads, width], contiguous -> [B, S, heads * width].

    A running softmax over blocks of keys, with sums in float32 (Dao et al. 2022, "FlashAttention"). It reads the
    product as it lies, and pads a head's width to a power of two and a rest. width: one of `HEAD_WIDTHS`.
    """
    assert qkv.is_contiguous()
    batch, length, _, heads, width = qkv.shape
    out = torch.empty(batch, length, heads * width, device=qkv.device, dtype=qkv.dtype)
    first = 1 << (width.bit_length() - 1)
    rest = max(power_of_two(width - first), SMALLEST_DOT) if width > first else 0
    grid = (-(-length // ATTENTION_ROWS), batch * heads)
    scale = LOG2E / math.sqrt(width)
    _attention[grid](qkv, out, length, heads, width, first, rest, scale, ATTENTION_ROWS, num_warps=4, num_stages=3)
    return out


@triton.jit
def _gate(
    product,
    row_scale,
    column_scale,
    quantised,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    MOST: tl.constexpr,
    LEAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    of_row = tl.load(row_scale + row)
    gate = tl.load(product + row * 2 * WIDTH + columns, inside, 0.0).to(tl.float32)
    gate *= of_row * tl.load(column_scale + columns, inside, 0.0)
    up = tl.load(product + row * 2 * WIDTH + WIDTH + columns, inside, 0.0).to(tl.float32)
    up *= of_row * tl.load(column_scale + WIDTH + columns, inside, 0.0)
    gated = gate * tl.sigmoid(gate) * up
    of_result = tl.maximum(tl.max(tl.abs(gated), 0), LEAST) / MOST
    tl.store(scale + row, of_result)
    # nothing is beyond MOST but by its own rounding, which the conversion rounds off
    tl.store(quantised + row * WIDTH + columns, (gated / of_result).to(tl.float8e4nv), inside)


def gate(product: Tensor, row_scale: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up (Shazeer 2020), quantised, in one pass.

    product [n, 2 * width] bfloat16, gate beside up, before its scales row_scale [n, 1] and column_scale [2 * width] in
    float32 -> (E4M3 [n, width], float32 scale [n, 1]), as `to_fp8` gives them. All contiguous.
    """
    assert product.is_contiguous() and row_scale.is_contiguous() and column_scale.is_contiguous()
    n, width = product.shape[0], product.shape[1] // 2
    quantised = torch.empty(n, width, device=product.device, dtype=FP8)
    scale = torch.empty(n, 1, device=product.device, dtype=torch.float32)
    padded = power_of_two(width)
    _gate[(n,)](product, row_scale, column_scale, quantised, scale, width, padded, FP8_MAX, SMALLEST_MAX, num_warps=8)
    return quantised, scale
