"""A stand-in for timm's VisionTransformer where timm is not installed: its parameter names and what it computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd_trt.config import TowerConfig


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))


class Block(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, config.mlp_width), "fc2": nn.Linear(config.mlp_width, width)})
        if config.layer_scale:
            self.ls1, self.ls2 = Scale(width), Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        heads = (rows, length, 3, self.config.heads, width // self.config.heads)
        q, k, v = self.attn["qkv"](self.norm1(x)).reshape(heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        y = self.attn["proj"]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + (self.ls1.gamma * y if self.config.layer_scale else y)
        approximate = "tanh" if self.config.gelu == "tanh" else "none"
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)), approximate=approximate))
        return x + (self.ls2.gamma * y if self.config.layer_scale else y)


class TimmDouble(nn.Module):
    """Without memory for its weights, as `rsd_trt.eval.verify.oracle.timm_tower` gives it."""

    def __init__(self, config: TowerConfig, image_size: int) -> None:
        super().__init__()
        self.prefix = config.prefix_tokens
        with torch.device("meta"):
            if self.prefix:
                self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
            if self.prefix > 1:
                self.reg_token = nn.Parameter(torch.empty(1, self.prefix - 1, config.width))
            self.pos_embed = nn.Parameter(torch.empty(1, (image_size // config.patch) ** 2, config.width))
            self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, config.patch, config.patch)})
            self.blocks = nn.Sequential(*(Block(config) for _ in range(config.blocks)))
            self.norm: nn.Module = nn.LayerNorm(config.width, eps=1e-6)

    def get_intermediate_layers(self, pixels: Tensor, n: int) -> list[Tensor]:
        assert n == 1
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed
        prefix = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        return [self.blocks(x)[:, self.prefix :]]
