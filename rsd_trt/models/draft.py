"""The original experiment's draft: the backbone's last hidden state -> logits of the coarse RFSQ layers L0..L{C-1}.

Module names follow RFSQDraftModelWithProjection of the original experiment, so that its checkpoints load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsd_trt.config import Dims, HiddenDraftConfig
from rsd_trt.models.classifiers import Classifiers
from rsd_trt.models.signature import Exportable, Port, Signature
from rsd_trt.models.vision import drawn


class ValueAttention(nn.Module):
    """Attention over a sequence of length 1: the only weight is softmax of one score, which is 1.

    What remains of multi-head attention is its value and output projection. The parameters are those of
    `torch.nn.MultiheadAttention`; the query and key thirds of `in_proj_*` are kept, and have no effect.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        value = nn.functional.linear(x, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])
        return self.out_proj(value)


class DecoderLayer(nn.Module):
    """`torch.nn.TransformerDecoderLayer` (norm first, GELU) on a length-1 sequence that is its own memory."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.self_attn = ValueAttention(width)
        self.multihead_attn = ValueAttention(width)
        self.linear1 = nn.Linear(width, mlp_width)
        self.linear2 = nn.Linear(mlp_width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, memory: Tensor) -> Tensor:
        x = memory + self.self_attn(self.norm1(memory))
        x = x + self.multihead_attn(memory)
        return x + self.linear2(nn.functional.gelu(self.linear1(self.norm3(x))))


class DraftDecoder(nn.Module):
    """Position encoding, one decoder layer, final norm."""

    def __init__(self, config: HiddenDraftConfig) -> None:
        super().__init__()
        self.position_encoding = drawn(1, config.positions, config.width)
        self.decoder_layer = DecoderLayer(config.width, config.mlp_width)
        self.output_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_norm(self.decoder_layer(x + self.position_encoding[:, 0]))


class DraftModel(Exportable):
    """hidden [B, H] -> logits [B, C, T*D, K]; the position index is t * D + d.

    Takes and gives float32, whatever the precision of its weights.
    """

    def __init__(self, config: HiddenDraftConfig, dims: Dims, hidden: int) -> None:
        super().__init__()
        self.dims = dims
        self.input_projection = nn.Linear(hidden, config.width)
        self.decoder = DraftDecoder(config)
        half = config.width // 2
        self.classification_heads = Classifiers(
            nn.Sequential(
                nn.Linear(config.width, half),
                nn.GELU(),
                nn.LayerNorm(half),
                nn.Linear(half, dims.T * dims.D * dims.K),
            )
            for _ in range(dims.C)
        )
        self.signature = Signature(
            inputs=(Port("hidden", ("B", "H")),),
            outputs=(Port("logits", ("B", "C", "T*D", "K")),),
            sizes={"H": hidden, "C": dims.C, "T*D": dims.T * dims.D, "K": dims.K},
        )

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.decoder(self.input_projection(hidden.to(self.input_projection.weight.dtype)))  # [B, width]
        logits = self.classification_heads(x).float()  # [B, C, T*D*K]
        return logits.view(hidden.shape[0], self.dims.C, self.dims.T * self.dims.D, self.dims.K)
