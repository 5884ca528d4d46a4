"""The backbone as it is run fast: the same maths as `rsd_trt.models.backbone`, in fewer and larger kernels.

Query, key and value are one matrix product, gate and up another; residuals are added by the product that ends a
branch; the two towers run on two CUDA streams; the last block computes the position that is read, and no other. A test
holds it to its slow twin.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd_trt.models.backbone import Backbone, CausalAttention, LlamaBlock, SwiGLU, rope_tables, rotate
from rsd_trt.models.vision import VisionTower

Rope = tuple[Tensor, Tensor]
FP8_MAX = 448.0  # the largest number of E4M3
FP8 = torch.float8_e4m3fn
ProductName = Literal["wqkv", "wo", "w13", "w2"]  # a block's four products
PRODUCTS: tuple[ProductName, ...] = get_args(ProductName)


class Product(Protocol):
    """x [n, in] -> x @ weight.T [n, out], plus `residual` [n, out] if there is one."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


class PlainProduct(nn.Module):
    """In the weight's own precision. weight [out, in]."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return x @ self.weight.t() if residual is None else torch.addmm(residual, x, self.weight.t())


class Fp8Product(nn.Module):
    """In E4M3: weights with a scale for each output channel, activations with one for each token.

    Products are summed in float32 and given in bfloat16 (Micikevicius et al. 2022, "FP8 formats for deep learning").
    Needs a GPU of compute capability 8.9 or later; `in` and `out` must be multiples of 16.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        quantised, scale = to_fp8(weight)
        self.register_buffer("weight", quantised)  # [out, in]
        self.register_buffer("scale", scale.t().contiguous())  # [1, out]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        quantised, scale = to_fp8(x)
        y = torch._scaled_mm(
            quantised, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return y if residual is None else residual + y


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, width] -> (E4M3 [n, width], float32 scale [n, 1]) with x = quantised * scale, about."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


class FusedBlock(nn.Module):
    """A `LlamaBlock` with four matrix products instead of seven. Takes the block's weights over."""

    def __init__(self, block: LlamaBlock, product: Callable[[ProductName, Tensor], Product]) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, CausalAttention) and isinstance(mlp, SwiGLU)
        self.norm1, self.norm2 = block.input_layernorm, block.post_attention_layernorm
        self.heads = attention.heads
        self.wqkv = product("wqkv", _stack(attention, "q_proj", "k_proj", "v_proj"))
        self.wo = product("wo", _stack(attention, "o_proj"))
        self.w13 = product("w13", _stack(mlp, "gate_proj", "up_proj"))
        self.w2 = product("w2", _stack(mlp, "down_proj"))

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        batch, length, hidden = x.shape
        flat = x.view(-1, hidden)  # [B * S, H]
        qkv = self.wqkv(self.norm1(flat)).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, S, H / heads]
        y = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True)
        flat = self.wo(y.transpose(1, 2).reshape(-1, hidden), flat)
        return self.mlp(flat).view(batch, length, hidden)

    def mlp(self, x: Tensor) -> Tensor:
        """x [n, H] -> [n, H], with the residual."""
        gate, up = self.w13(self.norm2(x)).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up, x)


class LastBlock(FusedBlock):
    """The block after which one position is read: only that position's query, output and MLP are computed."""

    def __init__(self, block: LlamaBlock) -> None:
        super().__init__(block, lambda _, weight: PlainProduct(weight))

    def forward(self, x: Tensor, rope: Rope, last: Tensor | None = None) -> Tensor:
        """x [B, S, H], last [B] the position to read -> [B, H]."""
        assert last is not None and isinstance(self.wqkv, PlainProduct)
        batch, length, hidden = x.shape
        heads = (batch, length, 2, self.heads, hidden // self.heads)
        rows = torch.arange(batch, device=x.device)
        normed = self.norm1(x)
        kv = F.linear(normed, self.wqkv.weight[hidden:]).view(heads).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)  # [B, heads, S, H / heads]
        q = F.linear(normed[rows, last], self.wqkv.weight[:hidden]).view(batch, self.heads, 1, -1)
        cos, sin = (table[last][:, None, None] for table in rope)  # [B, 1, 1, H / heads]
        seen = torch.arange(length, device=x.device) <= last[:, None]  # [B, S]
        y = F.scaled_dot_product_attention(
            rotate(q, (cos, sin)), rotate(k, rope), v, attn_mask=seen[:, None, None]
        )  # [B, heads, 1, H / heads]
        return self.mlp(self.wo(y.reshape(batch, hidden), x[rows, last]))


class FusedBackbone(nn.Module):
    """A `Backbone` for inference, in three steps: `embed`, `blocks`, and `read` or `finish`.

    It takes the given backbone's weights over, which cannot be used after. fp8: the products that are computed in
    E4M3, as (block, name), blocks counted from 0; the last block's never are.
    """

    def __init__(self, backbone: Backbone, fp8: Collection[tuple[int, ProductName]] = ()) -> None:
        super().__init__()
        self.config = backbone.config
        self.towers = backbone.vision_backbone
        self.projector = backbone.projector
        self.proprio_projector = backbone.proprio_projector
        llama = backbone.llama
        self.embed_tokens, self.norm = llama.embed_tokens, llama.norm
        *layers, last = llama.layers

        def fuse(i: int, layer: LlamaBlock) -> FusedBlock:
            return FusedBlock(layer, lambda name, w: Fp8Product(w) if (i, name) in fp8 else PlainProduct(w))

        self.layers = nn.ModuleList(fuse(i, layer) for i, layer in enumerate(layers))  # type: ignore[arg-type]
        self.last = LastBlock(last)  # type: ignore[arg-type]
        self._ropes: dict[int, Rope] = {}
        self._side: torch.cuda.Stream | None = None

    def embed(self, pixels: Tensor, tokens: Tensor, proprio: Tensor | None) -> Tensor:
        """pixels [B, images, towers, 3, S, S], tokens [B, P], proprio [B, 8] -> the embedded sequence [B, S, H]."""
        features = torch.cat(self.features(pixels), dim=-1)  # [B * images, patches, width]
        patches = self.projector(features).view(len(tokens), -1, self.config.language.hidden)
        text = self.embed_tokens(tokens)  # [B, P, H]
        seen = [patches]
        if self.proprio_projector is not None:
            assert proprio is not None
            seen.append(self.proprio_projector(proprio.to(patches.dtype))[:, None])
        return torch.cat([text[:, :1], *seen, text[:, 1:]], dim=1)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Each tower's patch features [B * images, patches, width]; on CUDA both at the same time."""
        first, second = self.towers.values()
        images = [pixels[:, :, i].flatten(0, 1) for i in range(len(self.towers))]
        if pixels.device.type != "cuda":
            return [first(images[0]), second(images[1])]
        here = torch.cuda.current_stream(pixels.device)
        self._side = self._side or torch.cuda.Stream(pixels.device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            there = second(images[1])
        out = [first(images[0]), there]
        here.wait_stream(self._side)
        return out

    def blocks(self, stream: Tensor, start: int, until: int) -> Tensor:
        """The residual stream [B, S, H] after block `start` -> after block `until` < N."""
        rope = self.rope(stream)
        for layer in self.layers[start:until]:
            stream = layer(stream, rope)
        return stream

    def read(self, stream: Tensor, last: Tensor) -> Tensor:
        """The hidden state [B, H] at positions `last` [B], as it stands between two blocks."""
        return stream[torch.arange(len(last), device=last.device), last]

    def finish(self, stream: Tensor, last: Tensor) -> Tensor:
        """The stream after block N - 1 -> the hidden state [B, H] after block N and the final norm."""
        return self.norm(self.last(stream, self.rope(stream), last))

    def rope(self, stream: Tensor) -> Rope:
        """The rotary tables of the stream's length, computed once."""
        length = stream.shape[1]
        if length not in self._ropes:
            self._ropes[length] = rope_tables(self.config.language, stream)
        return self._ropes[length]

    def compile(self) -> None:
        """Has torch.compile fuse what lies between the matrix products; kernels are made at the first run.

        One compilation serves all blocks of a kind.
        """
        for block in [*self.layers, self.last]:
            block.compile(dynamic=False)
        for tower in self.towers.values():
            assert isinstance(tower, VisionTower)
            for block in tower.blocks:
                block.compile(dynamic=False)
        self.projector.compile(dynamic=False)


def every_product(blocks: int) -> set[tuple[int, ProductName]]:
    """The products of a backbone of so many blocks that can be computed in E4M3: all but the last block's."""
    return {(i, name) for i in range(blocks - 1) for name in PRODUCTS}


def _stack(module: nn.Module, *names: str) -> Tensor:
    """The named linear layers' weights on top of each other; each is released as soon as it is copied."""
    weights = [getattr(module, name).weight.detach() for name in names]
    for name in names:
        setattr(module, name, None)
    return weights[0] if len(weights) == 1 else torch.cat(weights)
