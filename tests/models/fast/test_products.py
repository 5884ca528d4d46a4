"""The arithmetic of E4M3."""

from __future__ import annotations

import torch

from rsd_trt.models.fast.products import FP8_MAX, Fp8Product, fp8_products, power_of_two, to_fp8


def test_e4m3_keeps_three_bits_of_mantissa_with_a_scale_for_each_row() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]
    quantised, scale = to_fp8(x)
    assert quantised.dtype == torch.float8_e4m3fn
    assert scale.shape == (64, 1)
    error = (quantised.float() * scale - x).abs() / x.abs().amax(1, keepdim=True)
    assert float(error.max()) <= 2**-4  # half of the last of three bits, at the top of the range
    assert torch.equal(quantised.float().abs().amax(1), torch.full((64,), FP8_MAX))


def test_a_row_of_zeros_stays_zero_in_e4m3() -> None:
    quantised, scale = to_fp8(torch.zeros(1, 16))
    assert torch.equal(quantised.float() * scale, torch.zeros(1, 16))


def test_a_product_in_e4m3_is_that_of_the_rounded_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((5, 64), (32, 64)))
    (qx, sx), (qw, sw) = to_fp8(x), to_fp8(weight)
    expected = (qx.float() * sx) @ (qw.float() * sw).t()
    product = Fp8Product(weight)
    torch.testing.assert_close(product(x).float(), expected, rtol=2**-7, atol=1e-2)


def test_the_mlps_of_all_blocks_but_the_last_are_computed_in_e4m3() -> None:
    assert fp8_products(3) == {(0, "w13"), (0, "w2"), (1, "w13"), (1, "w2")}


def test_the_next_power_of_two() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [1, 2, 4, 4, 8, 16, 32]
