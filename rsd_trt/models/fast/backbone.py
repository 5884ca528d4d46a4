"""The backbone as it is run fast: the same maths as `rsd_trt.models.backbone`, in fewer and larger kernels.

Query, key and value are one matrix product, gate and up another; a residual is added where the next norm reads it, so
that both are one kernel when compiled; the two towers run on two CUDA streams; the last block computes the positions
that are read, and no other. Tests hold it to `Backbone`, with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd_trt.models.backbone import (
    Backbone,
    LlamaAttention,
    LlamaBlock,
    SwiGLU,
    embed_text,
    positions_read,
    real_positions,
    rope_tables,
    rotate,
)
from rsd_trt.models.fast.compiling import compile_arguments
from rsd_trt.models.fast.products import ALIGNMENT, Fp8Product, Product, ProductName, to_fp8
from rsd_trt.models.vision import Block, VisionTower, cut

Rope = tuple[Tensor, Tensor]
Gate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # of a SwiGLU in E4M3, as `kernels.gate`


class FusedBlock(nn.Module):
    """A `LlamaBlock` with four matrix products instead of seven. Takes the block's weights over.

    Reads and gives the residual stream as two terms whose sum it is.
    """

    def __init__(self, block: LlamaBlock, product: Callable[[ProductName, Tensor], Product]) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, LlamaAttention) and isinstance(mlp, SwiGLU)
        self.norm1, self.norm2 = block.input_layernorm, block.post_attention_layernorm
        self.heads, self.causal = attention.heads, attention.causal
        self.wqkv = product("wqkv", _stack(attention, "q_proj", "k_proj", "v_proj"))
        self.wo = product("wo", _stack(attention, "o_proj"))
        self.w13 = product("w13", _stack(mlp, "gate_proj", "up_proj"))
        self.w2 = product("w2", _stack(mlp, "down_proj"))
        self.gate: Gate | None = None

    def forward(self, x: Tensor, branch: Tensor, rope: Rope, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, branch [B, S, H] -> [B, S, H] both. real [B, 1, 1, S]: positions that are looked at; None: all."""
        batch, length, hidden = x.shape
        x = add(x, branch).view(-1, hidden)  # [B * S, H]
        qkv = self.wqkv(self.norm1(x)).view(batch, length, 3, self.heads, hidden // self.heads)
        x = add(x, self.wo(attend(qkv, rope, self.causal, real).view(-1, hidden)))
        return x.view(batch, length, hidden), self.mlp(x).view(batch, length, hidden)

    def mlp(self, x: Tensor) -> Tensor:
        """x [n, H] -> [n, H], without the residual."""
        w13, w2, normed = self.w13, self.w2, self.norm2(x)
        if self.gate is not None:
            assert isinstance(w13, Fp8Product) and isinstance(w2, Fp8Product)
            quantised, scale = to_fp8(normed)
            quantised, scale = self.gate(w13.multiply(quantised), scale, w13.scale)
            return w2.scaled(w2.multiply(quantised), scale).to(x.dtype)
        gate, up = w13(normed).chunk(2, dim=-1)
        return w2(F.silu(gate) * up)


class LastBlock(FusedBlock):
    """The block after which some positions are read: only their queries, outputs and MLPs are computed."""

    def __init__(self, block: LlamaBlock) -> None:
        super().__init__(block, lambda _, weight: Product(weight))

    def read(self, x: Tensor, rope: Rope, read: Tensor, real: Tensor | None = None) -> Tensor:
        """x [B, S, H], read [B, n] the positions to read -> [B, n, H], the whole stream there."""
        batch, length, hidden = x.shape
        rows = torch.arange(batch, device=x.device)[:, None]
        normed = self.norm1(x)
        kv = F.linear(normed, self.wqkv.weight[hidden:]).view(batch, length, 2, self.heads, -1)
        k, v = kv.unbind(2)  # [B, S, heads, H / heads]
        q = F.linear(normed[rows, read], self.wqkv.weight[:hidden]).view(*read.shape, self.heads, -1)
        there = rope[0][read], rope[1][read]  # [B, n, 1, H / heads]
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, there), rotate(k, rope), v))
        seen = (torch.arange(length, device=x.device) <= read[..., None])[:, None] if self.causal else real
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # [B, heads, n, H / heads]
        out = x[rows, read].view(-1, hidden) + self.wo(y.transpose(1, 2).reshape(-1, hidden))
        return (out + self.mlp(out)).view(*read.shape, hidden)


class FusedVisionBlock(nn.Module):
    """A tower's `Block` on a residual stream of two terms.

    before: the last layer scale of the block before, which is applied where the branch is added.
    """

    def __init__(self, block: Block, before: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.before = before
        self.attend: Callable[[Tensor], Tensor] = attend

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x, branch [n, P, width] -> [n, P, width] both."""
        block = self.block
        n, length, width = x.shape
        attention = block.attn
        x = add(x, self.before(branch))
        qkv = attention.qkv(block.norm1(x)).view(n, length, 3, attention.heads, width // attention.heads)
        x = add(x, block.ls1(attention.proj(self.attend(qkv))))
        return x, block.mlp(block.norm2(x))


class FusedTower(nn.Module):
    """A `VisionTower`. Takes its weights over."""

    weight: Tensor
    positions: Tensor

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        conv = tower.patch_embed.proj
        assert conv.bias is not None
        self.patch = conv.kernel_size[0]
        flat = conv.weight.detach().flatten(1)  # [width, 3 * patch * patch]
        self.padding = -flat.shape[1] % ALIGNMENT
        self.register_buffer("weight", F.pad(flat, (0, self.padding)))
        self.register_buffer("positions", tower.pos_embed.detach() + conv.bias.detach())  # [1, P, width]
        self.prefix = nn.ParameterList(
            getattr(tower, name) for name in ("cls_token", "reg_token") if hasattr(tower, name)
        )
        self.prefix_tokens = tower.prefix_tokens
        self.blocks = nn.ModuleList()
        self.scale: nn.Module = nn.Identity()  # of the branch that comes next
        for block in tower.blocks:
            assert isinstance(block, Block)
            self.blocks.append(FusedVisionBlock(block, before=self.scale))
            self.scale = block.ls2

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [n, 3, S, S], normalised -> features [n, P, width]."""
        x = self.embed(pixels)
        branch = torch.zeros_like(x)
        for block in self.blocks:
            x, branch = block(x, branch)
        return (x + self.scale(branch))[:, self.prefix_tokens :]

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels [n, 3, S, S] -> the sequence before block 1, [n, prefix + P, width]."""
        patches = F.pad(cut(pixels, self.patch), (0, self.padding))  # [n, P, 3 * patch * patch + padding]
        x = F.linear(patches, self.weight) + self.positions
        return torch.cat([*(token.expand(len(x), -1, -1) for token in self.prefix), x], dim=1)


class FusedBackbone(nn.Module):
    """A `Backbone` for inference.

    It takes the given backbone's weights over, which cannot be used after. fp8: the products that are computed in
    E4M3, as (block, name), blocks counted from 0; the last block's never are.
    """

    def __init__(self, backbone: Backbone, fp8: Collection[tuple[int, ProductName]] = ()) -> None:
        super().__init__()
        self.config = backbone.config
        first, second = backbone.vision_backbone.values()
        self.towers = nn.ModuleList(FusedTower(tower) for tower in (first, second))  # type: ignore[arg-type]
        self.projector = backbone.projector
        self.proprio_projector = backbone.proprio_projector
        llama = backbone.llama
        self.embed_tokens, self.norm = llama.embed_tokens, llama.norm
        *layers, last = llama.layers

        def fuse(i: int, layer: LlamaBlock) -> FusedBlock:
            return FusedBlock(layer, lambda name, weight: (Fp8Product if (i, name) in fp8 else Product)(weight))

        self.layers = nn.ModuleList(fuse(i, layer) for i, layer in enumerate(layers))  # type: ignore[arg-type]
        self.last = LastBlock(last)  # type: ignore[arg-type]
        self._ropes: dict[int, Rope] = {}
        self._side: torch.cuda.Stream | None = None
        self.compiled = False

    def forward(
        self, pixels: Tensor, tokens: Tensor, lengths: Tensor, proprio: Tensor | None, padded: bool = True
    ) -> Tensor:
        """What `BackboneInputs` holds -> the hidden state [B, H], with n action tokens [B, n, H].

        padded: whether rows may be shorter than the longest one, which attention to both sides needs a mask for.
        """
        stream = self.embed(pixels, tokens, proprio)
        length = stream.shape[1]
        ends = lengths + (length - tokens.shape[1])
        masked = padded and self.config.attention == "bidirectional"
        real = real_positions(ends, length) if masked else None
        return self.language(stream, positions_read(self.config, ends), real)

    def embed(self, pixels: Tensor, tokens: Tensor, proprio: Tensor | None) -> Tensor:
        """pixels [B, images, towers, 3, S, S], tokens [B, P], proprio [B, 8] -> the embedded sequence [B, S, H]."""
        features = torch.cat(self.features(pixels), dim=-1)  # [B * images, patches, width]
        patches = self.projector(features).view(len(tokens), -1, self.config.language.hidden)
        text = embed_text(self.embed_tokens, tokens, self.config)  # [B, P, H]
        seen = [patches]
        if self.proprio_projector is not None:
            assert proprio is not None
            seen.append(self.proprio_projector(proprio.to(patches.dtype))[:, None])
        return torch.cat([text[:, :1], *seen, text[:, 1:]], dim=1)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Each tower's patch features [B * images, patches, width]; on CUDA both at the same time."""
        first, second = self.towers
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

    def language(self, stream: Tensor, read: Tensor, real: Tensor | None = None) -> Tensor:
        """The embedded sequence [B, S, H] -> the hidden states [B, H] or [B, n, H] at positions `read`, after the final
        norm."""
        rope = self.rope(stream)
        branch = torch.zeros_like(stream)
        for layer in self.layers:
            stream, branch = layer(stream, branch, rope, real)
        hidden = self.last.read(stream + branch, rope, read.view(len(read), -1), real)  # [B, n, H]
        return self.norm(hidden).view(*read.shape, -1)

    def rope(self, stream: Tensor) -> Rope:
        """cos and sin [S, 1, H / heads] for the stream's length, computed once."""
        length = stream.shape[1]
        if length not in self._ropes:
            cos, sin = rope_tables(self.config.language, stream)
            self._ropes[length] = cos[:, None], sin[:, None]
        return self._ropes[length]

    def compile(self) -> None:
        """Has torch.compile fuse what lies between the matrix products; kernels are made at the first run.

        One compilation serves all blocks of a kind. The towers' attention in bfloat16, and what gates an MLP in
        E4M3, are kernels of our own. Needs CUDA and Triton.
        """
        from rsd_trt.models.fast import kernels

        self.compiled = True
        for layer in self.layers:
            assert isinstance(layer, FusedBlock)
            if isinstance(layer.w13, Fp8Product) and isinstance(layer.w2, Fp8Product):
                layer.gate = kernels.gate
        blocks = [block for tower in self.towers for block in tower.blocks]  # type: ignore[union-attr]
        for block in blocks:
            assert isinstance(block, FusedVisionBlock)
            attention = block.block.attn
            width = attention.qkv.in_features // attention.heads
            if kernels.can_attend(attention.qkv.weight, width):
                block.attend = kernels.attend
        given = compile_arguments()
        for module in (*self.layers, *blocks, self.projector):
            module.compile(**given)
        self.last.read = torch.compile(self.last.read, **given)  # type: ignore[method-assign]
        for tower in self.towers:
            assert isinstance(tower, FusedTower)
            tower.embed = torch.compile(tower.embed, **given)  # type: ignore[method-assign]


def attend(qkv: Tensor, rope: Rope | None = None, causal: bool = False, real: Tensor | None = None) -> Tensor:
    """Self-attention of qkv [B, S, 3, heads, width] -> [B, S, heads * width].

    rope: rotates queries and keys. real [B, 1, 1, S]: positions that are looked at, where it is not causal.
    """
    batch, length, _, heads, width = qkv.shape
    q, k, v = qkv.unbind(2)  # [B, S, heads, width]
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if causal else real, is_causal=causal
    )  # [B, heads, S, width]
    return y.transpose(1, 2).reshape(batch, length, heads * width)


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, rounded as ever; written so that torch.compile fuses it with the norm that follows, and not with the
    matrix product before: that would first copy x, and be slower."""
    return (x.float() + branch.float()).to(x.dtype)


def _stack(module: nn.Module, *names: str) -> Tensor:
    """The named linear layers' weights on top of each other; each is released as soon as it is copied."""
    weights = [getattr(module, name).weight.detach() for name in names]
    for name in names:
        setattr(module, name, None)
    return weights[0] if len(weights) == 1 else torch.cat(weights)
