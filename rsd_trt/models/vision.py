"""A vision transformer that is either of OpenVLA's towers, by configuration.

Parameter names follow timm, so that OpenVLA's checkpoints load by key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd_trt.config import TowerConfig

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, P, width / heads]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, mlp_width: int, gelu: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_width, config.gelu)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, projected. The weights are a convolution's, as in timm; they are multiplied as a matrix,
    since PyTorch computes matrix products of float32 exactly by default, and convolutions on CUDA in TF32."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch, stride=config.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = cut(pixels, self.proj.kernel_size[0])
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # [B, P, width]


class VisionTower(nn.Module):
    """Patch features of an image: the output of block `config.blocks`, without final norm and prefix tokens.

    Non-obvious: the position embedding covers the patches only and is added before the prefix tokens are put
    in front. OpenVLA reads the second-to-last block, so `blocks` is one less than the checkpoint has.
    """

    def __init__(self, config: TowerConfig, image_size: int) -> None:
        super().__init__()
        patches = (image_size // config.patch) ** 2
        self.prefix_tokens = config.prefix_tokens
        self.patch_embed = PatchEmbedding(config)
        if config.prefix_tokens:
            self.cls_token = drawn(1, 1, config.width)
        if config.prefix_tokens > 1:
            self.reg_token = drawn(1, config.prefix_tokens - 1, config.width)
        self.pos_embed = drawn(1, patches, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S], normalised -> features [B, P, width]."""
        x = self.patch_embed(pixels) + self.pos_embed
        prefix = [self.cls_token] if self.prefix_tokens else []
        prefix += [self.reg_token] if self.prefix_tokens > 1 else []
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.prefix_tokens :]


def drawn(*shape: int, std: float = 0.02) -> nn.Parameter:
    """A parameter of normal numbers; on the meta device of none, since to draw them there loads PyTorch's compiler,
    which takes a second."""
    empty = torch.empty(shape)
    return nn.Parameter(empty if empty.is_meta else nn.init.normal_(empty, std=std))


def cut(pixels: Tensor, patch: int) -> Tensor:
    """pixels [B, 3, S, S] -> patches of `patch` pixels a side, row by row: [B, P, 3 * patch * patch]."""
    count, channels, side, _ = pixels.shape
    grid = side // patch
    x = pixels.reshape(count, channels, grid, patch, grid, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(count, grid * grid, channels * patch * patch)
