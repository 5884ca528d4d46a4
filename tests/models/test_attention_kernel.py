"""The attention kernel against PyTorch's attention in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rsd_trt.models.backbone import rotate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "causal"),
    [
        (1, 284, 32, 128, True),  # OpenVLA's blocks
        (2, 320, 4, 64, True),
        (1, 1, 2, 32, True),
        (1, 261, 16, 64, False),  # DINOv2
        (2, 256, 16, 72, False),  # SigLIP
        (3, 65, 2, 40, False),
    ],
)
def test_the_kernel_equals_pytorch(
    batch: int, length: int, heads: int, width: int, causal: bool, dtype: torch.dtype
) -> None:
    from rsd_trt.models import attention_kernel

    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, width, device="cuda", generator=generator).to(dtype)
    rope = None
    if causal:
        angles = torch.rand(length, width // 2, device="cuda", generator=generator).mul(6.28).repeat(1, 2)
        rope = angles.cos().to(dtype), angles.sin().to(dtype)
    found = attention_kernel.attention(qkv, *(rope or (None, None)), causal)
    q, k, v = (x.transpose(1, 2).double() for x in qkv.unbind(2))
    if rope is not None:
        q, k = (rotate(x, (rope[0].double(), rope[1].double())) for x in (q, k))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]


def test_what_it_cannot_rotate_is_refused() -> None:
    from rsd_trt.models import attention_kernel

    qkv = torch.zeros(1, 4, 3, 2, 72, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros(4, 72, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="72 channels cannot be rotated"):
        attention_kernel.attention(qkv, table, table, True)
