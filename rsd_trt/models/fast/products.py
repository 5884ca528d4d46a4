"""The matrix products of the fused backbone's Llama blocks: in the weight's precision, or in E4M3."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8_MAX = 448.0  # the largest number of E4M3
FP8 = torch.float8_e4m3fn
SMALLEST_MAX = 1e-12  # what the largest number of a row counts for at least: a row of zeros has a scale, too
ProductName = Literal["wqkv", "wo", "w13", "w2"]  # a block's four products
MLP: tuple[ProductName, ...] = ("w13", "w2")  # what fp8 computes in E4M3
PRODUCTS: tuple[ProductName, ...] = get_args(ProductName)
ALIGNMENT = 16  # of a product's inner width for the fast kernels; products in E4M3 need it of both widths


class Product(nn.Module):
    """x [n, in] -> x @ weight.T [n, out], in the weight's precision. weight [out, in]."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Fp8Product(Product):
    """In E4M3: weights with a scale for each output channel, activations with one for each token.

    Sums are float32 and results bfloat16 (Micikevicius et al. 2022, "FP8 formats for deep learning"). The scales are
    multiplied after the product, where they fuse with what follows: cuBLAS's product with one scale is faster than
    with a scale for each row. Needs compute capability 8.9 or later; `in` and `out` must be multiples of `ALIGNMENT`.
    """

    scale: Tensor
    one: Tensor

    def __init__(self, weight: Tensor) -> None:
        quantised, scale = to_fp8(weight)
        super().__init__(quantised)
        self.register_buffer("scale", scale[:, 0])  # [out]
        self.register_buffer("one", torch.ones((), dtype=torch.float32, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        quantised, scale = to_fp8(x)
        return self.scaled(self.multiply(quantised), scale).to(x.dtype)

    def multiply(self, quantised: Tensor) -> Tensor:
        """E4M3 [n, in] -> the product before its scales, bfloat16 [n, out]."""
        return torch._scaled_mm(
            quantised, self.weight.t(), self.one, self.one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        """What `multiply` gave, and its rows' scales [n, 1] -> float32 [n, out]."""
        return y.float() * scale * self.scale


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, width] -> (E4M3 [n, width], float32 scale [n, 1]) with x = quantised * scale, about."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_MAX) / FP8_MAX
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def every_product(blocks: int) -> set[tuple[int, ProductName]]:
    """The products of a backbone of so many blocks that can be computed in E4M3: all but the last block's."""
    return {(i, name) for i in range(blocks - 1) for name in PRODUCTS}


def fp8_products(blocks: int) -> set[tuple[int, ProductName]]:
    """Those that are computed in E4M3 unless somebody chooses: the MLPs', two thirds of a 7B block's arithmetic.

    By measurement: of OpenVLA-7B's shapes with random weights, where attention's lose most, E4M3 in the MLPs leaves a
    cosine of 0.9994 to the final hidden state in bfloat16, in all products 0.9967
    (`examples/reference_policy/studies/fp8_sensitivity.py`).
    """
    return {(i, name) for i, name in every_product(blocks) if name in MLP}


def power_of_two(n: int) -> int:
    """The least that is not below n: what rows and widths are padded to."""
    return 1 << (n - 1).bit_length()
