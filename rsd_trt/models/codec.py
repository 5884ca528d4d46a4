"""The RFSQ codec: action chunks <-> residual finite scalar quantised tokens.

Layer i quantises what the layers before it have left, r_i = z - sum_{j<i} q_j, element by element:

    token_i = argmin_k |r_i / s_i - b_k|        q_i = s_i * b_token

with levels b = linspace(-1, 1, K) (finite scalar quantisation, Mentzer et al. 2023, in residual form). The scale
s_i decides what a token means, so it is stored with the weights:

    static      one number a layer. decode(encode(x)) equals forward(x) exactly.
    plain       s_i = 1.
    layernorm   r_i is normalised by its own mean and standard deviation, which are not in the tokens: decoding
                from tokens adds the raw levels, as the authors' code does, and is lossy.

Parameter names follow ActionRFSQAE of the original experiment, so that its checkpoints load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsd_trt.config import CodecConfig, Dims
from rsd_trt.models.signature import Exportable, Port, Signature

STD_EPS = 1e-5  # added to the standard deviation by the layernorm variant


class QuantiserLayer(nn.Module):
    """The levels of one layer."""

    boundaries: Tensor

    def __init__(self, levels: int) -> None:
        super().__init__()
        # Computed on the CPU: to compute on the meta device loads PyTorch's compiler, which takes a second.
        boundaries = torch.linspace(-1.0, 1.0, levels, device="cpu")
        self.register_buffer("boundaries", boundaries.to(torch.get_default_device()))

    def nearest(self, r: Tensor) -> Tensor:
        """Index of the level nearest to each element; the lower one of two that are equally near."""
        return (r.unsqueeze(-1) - self.boundaries).abs().argmin(-1)


class Quantiser(nn.Module):
    """The residual layers and, for static scales, one scale a layer."""

    def __init__(self, config: CodecConfig, dims: Dims) -> None:
        super().__init__()
        self.layernorm = config.scale == "layernorm"
        self.layers = nn.ModuleList(QuantiserLayer(dims.K) for _ in range(dims.L))
        self.scales: Tensor | None
        if config.scale == "static":
            # Half a level's distance is the largest residual that a layer leaves of values within its range.
            scales = (1.0 / (dims.K - 1)) ** torch.arange(dims.L, dtype=torch.float32, device="cpu")
            self.register_buffer("scales", scales.to(torch.get_default_device()))
        else:
            self.scales = None

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, T, D] -> (quantised z as in training, tokens [B, T, D, L])."""
        residual, total, tokens = z, torch.zeros_like(z), []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, QuantiserLayer)
            shift, scale = self._normaliser(i, residual)
            index = layer.nearest((residual - shift) / scale)
            step = layer.boundaries[index] * scale + shift
            total, residual = total + step, residual - step
            tokens.append(index)
        return total, torch.stack(tokens, dim=-1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, D, n] of the first n layers -> z [B, T, D]."""
        total = torch.zeros(tokens.shape[:-1], dtype=self._first.dtype, device=tokens.device)
        for i in range(tokens.shape[-1]):
            layer = self.layers[i]
            assert isinstance(layer, QuantiserLayer)
            step = layer.boundaries[tokens[..., i]]
            total = total + (step if self.scales is None else step * self.scales[i])
        return total

    def table(self) -> Tensor:
        """[L, K]: what each token of each layer adds to z."""
        levels = torch.stack([layer.boundaries for layer in self.layers if isinstance(layer, QuantiserLayer)])
        return levels if self.scales is None else levels * self.scales[:, None]

    def _normaliser(self, i: int, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The shift and scale of layer i."""
        if self.layernorm:
            return residual.mean(-1, keepdim=True), residual.std(-1, keepdim=True) + STD_EPS
        one = torch.ones((), dtype=residual.dtype, device=residual.device)
        return one * 0, one if self.scales is None else self.scales[i]

    @property
    def _first(self) -> Tensor:
        layer = self.layers[0]
        assert isinstance(layer, QuantiserLayer)
        return layer.boundaries


class Codec(nn.Module):
    """Action chunks [B, T, A] <-> tokens [B, T, D, L] (int64, 0..K-1)."""

    def __init__(self, config: CodecConfig, dims: Dims) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(dims.A, config.width), nn.Mish(), nn.Linear(config.width, dims.D), nn.Tanh()
        )
        self.rfsq = Quantiser(config, dims)
        self.decoder = nn.Sequential(nn.Linear(dims.D, config.width), nn.Mish(), nn.Linear(config.width, dims.A))

    def encode(self, actions: Tensor) -> Tensor:
        """actions [B, T, A] -> tokens [B, T, D, L]."""
        return self.rfsq.quantise(self.encoder(actions))[1]

    def decode(self, tokens: Tensor, layers: int | None = None) -> Tensor:
        """tokens [B, T, D, n] -> actions [B, T, A], from the first `layers` of them (default: all n)."""
        return self.decoder(self.rfsq.lookup(tokens[..., :layers]))

    def forward(self, actions: Tensor) -> Tensor:
        """actions [B, T, A] -> their reconstruction [B, T, A], as in training."""
        return self.decoder(self.rfsq.quantise(self.encoder(actions))[0])

    @torch.no_grad()
    def round_trip_error(self) -> float:
        """Mean squared difference between decode(encode(x)) and forward(x), for 256 seeded x, uniform in [-1, 1].

        Zero when tokens alone carry the action; large for the layernorm variant.
        """
        weight = self.encoder[0].weight
        assert isinstance(weight, Tensor)
        generator = torch.Generator().manual_seed(0)
        x = (torch.rand(256, 1, weight.shape[1], generator=generator) * 2 - 1).to(weight)
        return float((self.decode(self.encode(x)) - self(x)).square().mean())


class Decoder(Exportable):
    """tokens [B, T, D, L] -> actions [B, T, A]: `Codec.decode` as it is exported and launched.

    What a token adds is looked up in one table for all layers, so that decoding is one gather and one sum.
    """

    table: Tensor
    offsets: Tensor

    def __init__(self, codec: Codec, dims: Dims) -> None:
        super().__init__()
        self.decoder = codec.decoder
        table = codec.rfsq.table()  # [L, K]
        self.register_buffer("table", table.flatten(), persistent=False)
        self.register_buffer("offsets", torch.arange(dims.L, device=table.device) * dims.K, persistent=False)
        self.signature = Signature(
            inputs=(Port("tokens", ("B", "T", "D", "L"), "int64"),),
            outputs=(Port("actions", ("B", "T", "A")),),
            sizes={"T": dims.T, "D": dims.D, "L": dims.L, "A": dims.A},
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Also decodes tokens of the first layers only, [B, T, D, n]."""
        return self.decoder(self.table[tokens + self.offsets[: tokens.shape[-1]]].sum(-1))
