"""The kernels in Triton, against what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rsd_trt.models.backbone import Backbone
from rsd_trt.models.fast import backbone as fused_backbone
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.models.fast.products import to_fp8
from rsd_trt.presets import preset

kernels = pytest.importorskip("rsd_trt.models.fast.kernels", reason="no Triton", exc_type=ImportError)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"),
    [(1, 261, 16, 64), (2, 256, 16, 72), (3, 100, 4, 80), (1, 17, 2, 16), (1, 64, 1, 24), (1, 1, 3, 64)],
)
def test_attention(batch: int, length: int, heads: int, width: int) -> None:
    qkv = random(batch, length, 3, heads, width).bfloat16()
    expected = fused_backbone.attend(qkv.float())
    torch.testing.assert_close(kernels.attend(qkv).float(), expected, rtol=2**-7, atol=2**-8)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no FP8")
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 640), (284, 11008)])
def test_gate(rows: int, width: int) -> None:
    product = random(rows, 2 * width).bfloat16()
    product[1:2] = 0
    of_rows, of_columns = random(rows, 1, seed=1).abs(), random(2 * width, seed=2).abs()
    gate, up = (product.float() * of_rows * of_columns).chunk(2, dim=-1)
    expected, expected_scale = to_fp8(nn.functional.silu(gate) * up)
    found, scale = kernels.gate(product, of_rows, of_columns)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    # one step of E4M3 apart at most, where a number lies between two
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-3, atol=2**-9)
    assert float((found.float() != expected.float()).float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiled_backbone_has_them_where_they_fit(dtype: torch.dtype) -> None:
    config = preset("reference", "x").backbone  # heads of 64
    fp8 = {(0, "w13"), (0, "w2"), (1, "w13")}
    with torch.device("cuda"):
        fused = FusedBackbone(Backbone(config).to(dtype), fp8)
    fused.compile()
    assert [block.gate for block in fused.layers[:3]] == [kernels.gate, None, None]
    expected = kernels.attend if dtype == torch.bfloat16 else fused_backbone.attend
    assert {block.attend for tower in fused.towers for block in tower.blocks} == {expected}
