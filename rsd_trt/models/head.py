"""The main head: a hidden state -> logits of all RFSQ layers L0..L{L-1}, or action tokens' hidden states -> actions.

Module names follow the three head classes of the original experiment and OpenVLA-OFT's, so that their checkpoints load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd_trt.config import Dims, HeadConfig
from rsd_trt.models.classifiers import Classifiers
from rsd_trt.models.signature import Exportable, Port, Signature

HIDDEN = Port("hidden", ("B", "H"))
CONDITION = Port("condition", ("B", "T", "D", "C"), "int64")


class Head(Exportable):
    """What the heads that give logits share: their dimensions and their signature.

    They take and give float32, whatever the precision of their weights.
    """

    def __init__(self, dims: Dims, hidden: int, conditioned: bool = False) -> None:
        super().__init__()
        self.dims = dims
        self.conditioned = conditioned
        self.signature = Signature(
            inputs=(HIDDEN, CONDITION) if conditioned else (HIDDEN,),
            outputs=(Port("logits", ("B", "L", "T*D", "K")),),
            sizes={
                "H": hidden,
                "T": dims.T,
                "D": dims.D,
                "C": dims.C,
                "L": dims.L,
                "T*D": dims.T * dims.D,
                "K": dims.K,
            },
        )

    def classify(self, x: Tensor, classifiers: Classifiers) -> Tensor:
        """x [B, width], one classifier a layer -> logits [B, L, T*D, K]."""
        logits = classifiers(x).float()  # [B, L, T*D*K]
        return logits.view(x.shape[0], self.dims.L, self.dims.T * self.dims.D, self.dims.K)

    def cast(self, hidden: Tensor) -> Tensor:
        """The hidden state in the weights' precision."""
        return hidden.to(next(self.parameters()).dtype)


class RFSQHead(Head):
    """hidden [B, H] -> logits [B, L, T*D, K], through one shared feature layer."""

    def __init__(self, config: HeadConfig, dims: Dims, hidden: int, conditioned: bool = False) -> None:
        super().__init__(dims, hidden, conditioned)
        self.feature_proj = _project(hidden, config.feature)
        self.layer_heads = Classifiers(
            nn.Sequential(*_project(config.feature, config.width), nn.Linear(config.width, dims.T * dims.D * dims.K))
            for _ in range(dims.L)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classify(self.feature_proj(self.cast(hidden)), self.layer_heads)


class ConditionedRFSQHead(RFSQHead):
    """hidden [B, H], condition [B, T, D, C] (the draft's tokens) -> logits [B, L, T*D, K].

    Non-obvious: it predicts L0..L{C-1} mostly by copying its condition, so its agreement with the draft is no
    evidence that the draft is right.
    """

    def __init__(self, config: HeadConfig, dims: Dims, hidden: int) -> None:
        super().__init__(config, dims, hidden, conditioned=True)
        self.token_embedding = nn.Embedding(dims.K, config.embedding)
        self.token_proj = _project(dims.T * dims.D * dims.C * config.embedding, config.feature)
        self.fusion = _project(2 * config.feature, config.feature)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        tokens = self.token_proj(self.token_embedding(condition).flatten(1))  # [B, feature]
        x = self.fusion(torch.cat([self.feature_proj(self.cast(hidden)), tokens], dim=-1))  # [B, feature]
        return self.classify(x, self.layer_heads)


class RFSQClassificationHead(Head):
    """hidden [B, H] -> logits [B, L, T*D, K], with one deep classifier a layer and nothing shared."""

    def __init__(self, config: HeadConfig, dims: Dims, hidden: int) -> None:
        super().__init__(dims, hidden)
        self.classification_heads = Classifiers(
            nn.Sequential(
                *_project(hidden, config.width),
                *_project(config.width, config.width // 2),
                nn.Linear(config.width // 2, dims.T * dims.D * dims.K),
            )
            for _ in range(dims.L)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classify(self.cast(hidden), self.classification_heads)


class ResidualBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ResidualMLP(nn.Module):
    """A step's hidden states, side by side [..., A*H] -> its action [..., A]."""

    def __init__(self, config: HeadConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, config.width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.blocks))
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.fc2 = nn.Linear(config.width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class ActionHead(Exportable):
    """OpenVLA-OFT's head for L1 regression: hidden [B, T*A, H] -> actions [B, T, A], normalised.

    It takes and gives float32, whatever the precision of its weights.
    """

    def __init__(self, config: HeadConfig, dims: Dims, hidden: int) -> None:
        super().__init__()
        self.dims = dims
        self.model = ResidualMLP(config, dims.A * hidden, dims.A)
        self.signature = Signature(
            inputs=(Port("hidden", ("B", "T*A", "H")),),
            outputs=(Port("actions", ("B", "T", "A")),),
            sizes={"H": hidden, "T": dims.T, "A": dims.A, "T*A": dims.T * dims.A},
        )

    def forward(self, hidden: Tensor) -> Tensor:
        steps = hidden.reshape(hidden.shape[0], self.dims.T, -1)  # [B, T, A*H]
        return self.model(steps.to(self.model.fc1.weight.dtype)).float()


def build_head(config: HeadConfig, dims: Dims, hidden: int) -> Head | ActionHead:
    """The head of `config.kind`."""
    if config.kind == "oft-l1":
        return ActionHead(config, dims, hidden)
    classes: dict[str, type[Head]] = {
        "rfsq": RFSQHead,
        "conditioned": ConditionedRFSQHead,
        "classification": RFSQClassificationHead,
    }
    return classes[config.kind](config, dims, hidden)  # type: ignore[arg-type]


def _project(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.LayerNorm(outputs))
