"""OpenVLA's architecture: two vision towers, a projector, Llama blocks.

Parameter names follow OpenVLA's checkpoints, so that they load by key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd_trt.config import FEATURIZERS, PROPRIO_DIM, BackboneConfig, LanguageConfig
from rsd_trt.models.vision import VisionTower, drawn

PLACEHOLDER = -1  # a token without an embedding: zeros


@dataclass(frozen=True)
class BackboneInputs:
    """What the backbone reads.

    pixels [B, images, towers, 3, S, S], normalised for each tower; tokens [B, P] int64, BOS first, with action tokens
    `PLACEHOLDER`s and the stop token behind the prompt, padded on the right; lengths [B] int64, real tokens of each
    row; proprio [B, 8], or None without a proprioception token.
    """

    pixels: Tensor
    tokens: Tensor
    lengths: Tensor
    proprio: Tensor | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the root mean square in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class LlamaAttention(nn.Module):
    """Multi-head self-attention with rotary position embeddings, causal or to both sides."""

    def __init__(self, config: LanguageConfig, causal: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.causal = causal
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], real: Tensor | None) -> Tensor:
        """real [B, 1, 1, S]: positions that are looked at, for attention to both sides; None: all."""
        batch, length, hidden = x.shape
        heads = (batch, length, self.heads, hidden // self.heads)
        q, k, v = (p(x).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rope), rotate(k, rope)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=real, is_causal=self.causal)
        return self.o_proj(x.transpose(1, 2).reshape(batch, length, hidden))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """A Llama block: attention and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: LanguageConfig, causal: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.rms_eps)
        self.self_attn = LlamaAttention(config, causal)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.rms_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], real: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, real)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token embedding, blocks and final norm."""

    def __init__(self, config: LanguageConfig, causal: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(drawn(config.vocab, config.hidden, std=1.0), freeze=False)
        self.layers = nn.ModuleList(LlamaBlock(config, causal) for _ in range(config.blocks))
        self.norm = RMSNorm(config.hidden, config.rms_eps)


class Projector(nn.Module):
    """Patch features -> embeddings, as OpenVLA's fused projector: three layers, the first four times as wide."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, hidden)
        self.fc3 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class ProprioProjector(nn.Module):
    """The robot's own state -> one embedding, as OpenVLA-OFT's."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(PROPRIO_DIM, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Backbone(nn.Module):
    """Images, prompt and proprioception -> the hidden state at the prompt's last position, after the final norm; with
    action tokens the states there and at the placeholders behind it but the last.

    The sequence is: BOS, the patches of every image in a row, the proprioception token, the rest of the prompt, with
    action tokens the placeholders and the stop token (OpenVLA-OFT).
    The prompts of a batch may have different lengths: they are padded on the right, and causal attention, or a mask
    with attention to both sides, keeps the padding out of every position that is read.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_backbone = nn.ModuleDict(
            {
                name: VisionTower(tower, config.image_size)
                for name, tower in zip(FEATURIZERS, config.towers, strict=True)
            }
        )
        hidden = config.language.hidden
        self.projector = Projector(sum(tower.width for tower in config.towers), hidden)
        self.proprio_projector = ProprioProjector(hidden) if config.proprio else None
        self.language_model = nn.ModuleDict({"model": Llama(config.language, config.attention == "causal")})

    @property
    def llama(self) -> Llama:
        model = self.language_model["model"]
        assert isinstance(model, Llama)
        return model

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """-> the hidden state [B, H], with n action tokens [B, n, H]."""
        stream, read = self.embed(inputs)
        return self.language(stream, read, self.real(inputs, stream.shape[1]))

    def embed(self, inputs: BackboneInputs) -> tuple[Tensor, Tensor]:
        """The embedded sequence [B, S, H], and the positions in it, [B] or [B, n], that are read."""
        images = inputs.pixels.shape[1]
        features = torch.cat(
            [
                tower(inputs.pixels[:, :, i].flatten(0, 1))  # [B * images, P, width]
                for i, tower in enumerate(self.vision_backbone.values())
            ],
            dim=-1,
        )
        patches = self.projector(features)  # [B * images, P, H]
        patches = patches.view(len(inputs.tokens), images * patches.shape[1], -1)  # [B, images * P, H]
        text = embed_text(self.llama.embed_tokens, inputs.tokens, self.config)  # [B, P, H]
        seen = [patches]
        if self.proprio_projector is not None:
            if inputs.proprio is None:
                raise ValueError("this backbone has a proprioception token, and the inputs have no proprio")
            seen.append(self.proprio_projector(inputs.proprio.to(patches.dtype))[:, None])
        stream = torch.cat([text[:, :1], *seen, text[:, 1:]], dim=1)  # [B, S, H]
        return stream, positions_read(self.config, inputs.lengths + stream.shape[1] - text.shape[1])

    def real(self, inputs: BackboneInputs, length: int) -> Tensor | None:
        """[B, 1, 1, S] where an embedded sequence of that length is no padding; None where attention needs no mask."""
        tokens = inputs.tokens.shape[1]
        if self.config.attention == "causal" or bool((inputs.lengths == tokens).all()):
            return None
        return real_positions(inputs.lengths + length - tokens, length)

    def language(self, stream: Tensor, read: Tensor, real: Tensor | None = None) -> Tensor:
        """The embedded sequence [B, S, H] -> the hidden states [B, H] or [B, n, H] at positions `read`."""
        rope = rope_tables(self.config.language, stream)
        for layer in self.llama.layers:
            stream = layer(stream, rope, real)
        rows = torch.arange(len(read), device=read.device)
        return self.llama.norm(stream[rows if read.ndim == 1 else rows[:, None], read])


def embed_text(table: nn.Embedding, tokens: Tensor, config: BackboneConfig) -> Tensor:
    """tokens [B, P] -> embeddings [B, P, H]; a `PLACEHOLDER` has none."""
    if not config.action_tokens:
        return table(tokens)
    return table(tokens.clamp_min(0)) * (tokens != PLACEHOLDER)[..., None]


def positions_read(config: BackboneConfig, ends: Tensor) -> Tensor:
    """Where hidden states are read in sequences that end before `ends` [B]: [B], with n action tokens [B, n]."""
    if not config.action_tokens:
        return ends - 1
    first = ends - 2 - config.action_tokens  # the prompt's last: placeholders and a stop token stand behind it
    return first[:, None] + torch.arange(config.action_tokens, device=ends.device)


def real_positions(ends: Tensor, length: int) -> Tensor:
    """[B, 1, 1, length], true before `ends` [B]: what attention to both sides may look at."""
    return (torch.arange(length, device=ends.device) < ends[:, None])[:, None, None]


def rope_tables(config: LanguageConfig, stream: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, H / heads] of the rotary angles (Su et al. 2021), in the stream's dtype."""
    width = config.hidden // config.heads
    exponent = torch.arange(0, width, 2, device=stream.device, dtype=torch.float32) / width
    positions = torch.arange(stream.shape[1], device=stream.device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / config.rope_theta**exponent).repeat(1, 2)
    return angles.cos().to(stream.dtype), angles.sin().to(stream.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (i, i + half) of x [B, heads, S, H / heads], as Llama's checkpoints expect."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
