"""The original RSD experiment's modules, written from the description of its checkpoints, at small shapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

T, A, D, L, C, K = 4, 7, 6, 5, 2, 3
HIDDEN, WIDTH, FEATURE, EMBEDDING = 32, 16, 12, 4
OUTPUTS = T * D * K


class TransformerDraft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position_encoding = nn.Parameter(torch.zeros(1, 20, WIDTH))
        self.decoder_layer = nn.TransformerDecoderLayer(
            WIDTH, 8, 24, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.output_norm = nn.LayerNorm(WIDTH)


class RFSQDraftModelWithProjection(nn.Module):
    def __init__(self, layers: int = C, hidden: int = HIDDEN, outputs: int = OUTPUTS) -> None:
        super().__init__()
        self.input_projection = nn.Linear(hidden, WIDTH)
        self.decoder = TransformerDraft()
        self.classification_heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH // 2), nn.GELU(), nn.LayerNorm(WIDTH // 2), nn.Linear(WIDTH // 2, outputs)
            )
            for _ in range(layers)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.input_projection(hidden)[:, None] + self.decoder.position_encoding[:, :1]
        x = self.decoder.output_norm(self.decoder.decoder_layer(x, x))[:, 0]
        return torch.stack([head(x).view(-1, T * D, K) for head in self.classification_heads], dim=1)


def project(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.GELU(), nn.LayerNorm(outputs)]


class RFSQHead(nn.Module):
    def __init__(self, layers: int = L, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.feature_proj = nn.Sequential(*project(hidden, FEATURE))
        self.layer_heads = nn.ModuleList(
            nn.Sequential(*project(FEATURE, WIDTH), nn.Linear(WIDTH, OUTPUTS)) for _ in range(layers)
        )

    def classify(self, x: Tensor) -> Tensor:
        return torch.stack([head(x).view(-1, T * D, K) for head in self.layer_heads], dim=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classify(self.feature_proj(hidden))


class ConditionedRFSQHead(RFSQHead):
    def __init__(self, condition: int = C, levels: int = K) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(levels, EMBEDDING)
        self.token_proj = nn.Sequential(*project(T * D * condition * EMBEDDING, FEATURE))
        self.fusion = nn.Sequential(*project(2 * FEATURE, FEATURE))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        tokens = self.token_proj(self.token_embedding(condition).reshape(len(condition), -1))
        return self.classify(self.fusion(torch.cat([self.feature_proj(hidden), tokens], dim=-1)))


class RFSQClassificationHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classification_heads = nn.ModuleList(
            nn.Sequential(*project(HIDDEN, WIDTH), *project(WIDTH, WIDTH // 2), nn.Linear(WIDTH // 2, OUTPUTS))
            for _ in range(L)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack([head(hidden).view(-1, T * D, K) for head in self.classification_heads], dim=1)


class STE(nn.Module):
    """One layer's levels."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.register_buffer("boundaries", torch.linspace(-1, 1, levels))

    boundaries: Tensor


class RFSQ(nn.Module):
    def __init__(self, layers: int, levels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(STE(levels) for _ in range(layers))


class ActionRFSQAE(nn.Module):
    def __init__(self, use_layernorm: bool, levels: int = K, actions: int = A, layers: int = L) -> None:
        super().__init__()
        self.use_layernorm = use_layernorm
        self.encoder = nn.Sequential(nn.Linear(actions, 10), nn.Mish(), nn.Linear(10, D), nn.Tanh())
        self.rfsq = RFSQ(layers, levels)
        self.decoder = nn.Sequential(nn.Linear(D, 10), nn.Mish(), nn.Linear(10, actions))

    def encode(self, actions: Tensor) -> Tensor:
        residual, codes = self.encoder(actions), []
        for layer in self.rfsq.layers:
            mean = residual.mean(-1, keepdim=True) if self.use_layernorm else torch.zeros(())
            std = residual.std(-1, keepdim=True) + 1e-5 if self.use_layernorm else torch.ones(())
            distance = ((residual - mean) / std)[..., None] - layer.boundaries
            code = distance.abs().argmin(-1)
            codes.append(code)
            residual = residual - (layer.boundaries[code] * std + mean)
        return torch.stack(codes, dim=-1)

    def decode_from_indices(self, tokens: Tensor) -> Tensor:
        z = sum(layer.boundaries[tokens[..., i]] for i, layer in enumerate(self.rfsq.layers))
        return self.decoder(z)
