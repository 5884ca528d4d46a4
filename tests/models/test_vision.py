"""The vision tower against PyTorch's own attention, and golden values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rsd_trt.config import TowerConfig
from rsd_trt.models.vision import VisionTower

SIZE = 32
DINO = TowerConfig(
    width=24,
    blocks=3,
    heads=4,
    mlp_width=40,
    patch=8,
    prefix_tokens=5,
    layer_scale=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
SIGLIP = structs.replace(DINO, prefix_tokens=0, layer_scale=False, gelu="tanh")
CLASS_ONLY = structs.replace(DINO, prefix_tokens=1)


def reference(config: TowerConfig, weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The tower as its authors describe it, from torch.nn.MultiheadAttention and plain functions."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (config.width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def scale(x: Tensor, name: str) -> Tensor:
        return x * weights[f"{name}.scale_factor"] if config.layer_scale else x

    patches = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    x = F.conv2d(pixels, *patches, stride=config.patch).flatten(2).transpose(1, 2)  # [B, P, width]
    x = x + weights["pos_embed"]
    for name in ("reg_token", "cls_token"):
        if name in weights:
            x = torch.cat([weights[name].repeat(len(x), 1, 1), x], dim=1)
    attention = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
    for i in range(config.blocks):
        block = f"blocks.{i}"
        attention.load_state_dict(
            {
                "in_proj_weight": weights[f"{block}.attn.qkv.weight"],
                "in_proj_bias": weights[f"{block}.attn.qkv.bias"],
                "out_proj.weight": weights[f"{block}.attn.proj.weight"],
                "out_proj.bias": weights[f"{block}.attn.proj.bias"],
            }
        )
        y = norm(x, f"{block}.norm1")
        x = x + scale(attention(y, y, y)[0], f"{block}.ls1")
        y = F.gelu(
            linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"),
            approximate="tanh" if config.gelu == "tanh" else "none",
        )
        x = x + scale(linear(y, f"{block}.mlp.fc2"), f"{block}.ls2")
    return x[:, config.prefix_tokens :]


@pytest.mark.parametrize("config", [DINO, SIGLIP, CLASS_ONLY], ids=["dino", "siglip", "class-only"])
@torch.no_grad()
def test_equals_an_independent_assembly(config: TowerConfig, randomise: Callable[..., None]) -> None:
    tower = VisionTower(config, SIZE)
    randomise(tower)
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    features = tower(pixels)
    assert features.shape == (2, 16, config.width)
    torch.testing.assert_close(features, reference(config, tower.state_dict(), pixels), rtol=1e-5, atol=1e-5)


class Launched(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nothing_is_a_convolution_which_cuda_computes_in_tf32() -> None:
    with Launched() as launched:
        VisionTower(DINO, SIZE)(torch.zeros(1, 3, SIZE, SIZE))
    assert any("addmm" in name for name in launched.names)
    assert not [name for name in launched.names if "conv" in name]


@pytest.mark.parametrize(
    ("config", "golden"),
    [(DINO, [0.10325, -0.08502, -0.29389, -0.499]), (SIGLIP, [-0.14765, -0.21831, -0.2316, -0.27603])],
    ids=["dino", "siglip"],
)
@torch.no_grad()
def test_golden_values(config: TowerConfig, golden: list[float]) -> None:
    """Regenerate: the three lines below, then `features[0, ::5, 0].tolist()`."""
    torch.manual_seed(0)
    tower = VisionTower(config, SIZE)
    features = tower(torch.linspace(-2, 2, 3 * SIZE * SIZE).view(1, 3, SIZE, SIZE))
    assert features[0, ::5, 0].tolist() == pytest.approx(golden, abs=1e-4)


def test_parameters_of_a_tower_without_prefix_tokens_or_layer_scale() -> None:
    names = set(VisionTower(SIGLIP, SIZE).state_dict())
    assert not [name for name in names if "ls1" in name or "ls2" in name or name in ("cls_token", "reg_token")]
