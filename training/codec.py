"""The codec: an autoencoder that spreads every action dimension over latents of its own.

Latent j carries one action dimension d(j), z_j = RANGE * x_d + offset_j, where x is the action with its range brought
to [-1, 1], and the decoder takes the mean over the latents of a dimension. That keeps what matters here: all of the
range decodes, an error of a latent is an error of one dimension and of no more than its own size, and the offsets put
the latents' quantisation errors out of step, so that they cancel. The two networks are fitted to these functions; their
hidden units are shared out among the latents.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd_trt.bundle import Bundle
from rsd_trt.config import ACTION_DIMS, ARM_DIMS, BundleConfig
from rsd_trt.errors import UserError
from rsd_trt.models.codec import Codec
from rsd_trt.training.store import Store

log = logging.getLogger(__name__)

# A layer reaches three times as far as what the layer before leaves when it chooses the nearest level, so that the
# layers behind can also make good a neighbouring choice. The last layer's half step is (1/3)^7 / 6 = 8e-5.
SCALE_RATIO = 1 / 3
RANGE = 2 / 3  # of z: the largest actions, which are frequent, lie on a level of layer 0
OFFSETS = {1: (0.0,), 2: (-0.0278, 0.0278), 3: (-0.086, 0.0, 0.049)}  # by the number of latents of a dimension
ENCODER_UNITS = (1.5, 3.0, 1.0)  # slope, spread and middle of the biases that the hidden units start from
DECODER_UNITS = (0.5, 3.0, 0.0)  # so smooth that four of them make a straight line to 1e-6
NARROWEST = 1e-3  # half a range, in action units
GRID = 401  # points that a function is fitted on
LARGEST_ERROR = 1e-2  # of any of the data's actions, in halves of their range
MARGIN = 0.05  # of a range, beyond the actions that were seen
PART = 1 << 16  # actions that are encoded at a time: the tokens of one take 40 times its memory


@dataclass(frozen=True)
class CodecErrors:
    """Reconstruction errors, by the number of layers that are decoded."""

    largest: tuple[float, ...]
    mean: tuple[float, ...]
    wrong_grippers: tuple[float, ...]  # share of the gripper signs that are wrong


@dataclass(frozen=True)
class Ranges:
    """The middle and half the width of each action dimension's range [A], in the policy's units."""

    middle: tuple[float, ...] = (0.0,) * ACTION_DIMS
    half: tuple[float, ...] = (1.0,) * ACTION_DIMS

    @classmethod
    def of(cls, actions: Tensor) -> Ranges:
        """Those of the actions [S, A], a little wider, so that most that were not seen lie within as well."""
        low, high = actions.amin(0).double().cpu(), actions.amax(0).double().cpu()
        half = ((high - low) / 2).clamp_min(NARROWEST) * (1 + MARGIN)
        return cls(tuple(((high + low) / 2).tolist()), tuple(half.tolist()))


UNIT = Ranges()  # of the environment's actions


def fit_codec(config: BundleConfig, iterations: int = 300, ranges: Ranges = UNIT) -> Codec:
    """A codec with static scales, the same on every machine but for rounding.

    Raises:
        UserError: it cannot be constructed with the configuration's sizes.
    """
    dims = config.dims
    units = config.codec.width // dims.D
    if config.codec.scale != "static" or not dims.A <= dims.D <= max(OFFSETS) * dims.A or not units:
        raise UserError(
            f"no codec can be constructed with codec.scale {config.codec.scale}, codec.width {config.codec.width} and "
            f"dims.D {dims.D}: the scale must be static, D {dims.A} to {max(OFFSETS) * dims.A}, the width at least D"
        )
    codec = Codec(config.codec, dims)
    assert codec.rfsq.scales is not None
    codec.rfsq.scales.copy_(SCALE_RATIO ** torch.arange(dims.L))
    owner, offsets, copies = _share_out(dims.D, dims.A)
    grid = torch.linspace(-1, 1, GRID, dtype=torch.float64).expand(dims.D, -1)  # [D, G]
    z = RANGE * grid + offsets[:, None]
    encode = _Units(dims.D, units, ENCODER_UNITS)
    encode.solve(grid, z.atanh(), weight=1 - z.square())
    _polish(encode, grid, z, iterations)
    decode = _Units(dims.D, units, DECODER_UNITS)
    decode.solve(encode(grid).tanh(), grid, weight=torch.ones_like(grid))
    with torch.no_grad():
        first, _, last, _ = codec.encoder
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        _place(first, last, encode, torch.eye(dims.A)[owner], torch.eye(dims.D))
        first, _, last = codec.decoder
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        _place(first, last, decode, torch.eye(dims.D), (torch.eye(dims.A)[owner] / copies[:, None]).T)
        _stretch(codec, ranges)
    return codec.requires_grad_(False).eval()


def check_codec(codec: Codec, actions: Tensor, ranges: Ranges = UNIT) -> CodecErrors:
    """The codec's errors over the data's actions [S, A] and over as much uniform noise in their ranges.

    Raises:
        UserError: an action is off by more than `LARGEST_ERROR`, or a gripper's side of the middle is wrong, with all
            layers.
    """
    uniform = torch.rand(actions.shape, generator=torch.Generator().manual_seed(0)).to(actions) * 2 - 1
    middle, half = (torch.tensor(values).to(actions) for values in (ranges.middle, ranges.half))
    errors = codec_errors(codec, actions, ranges)
    largest = max(errors.largest[-1], codec_errors(codec, uniform * half + middle, ranges).largest[-1])
    log.info("codec: %s, largest error over uniform noise too: %.2g", errors, largest)
    if largest > LARGEST_ERROR or errors.wrong_grippers[-1] > 0:
        raise UserError(
            f"the codec is off by up to {largest:.3g} (limit {LARGEST_ERROR}), with a share of "
            f"{errors.wrong_grippers[-1]:.3g} of the grippers wrong: fit it with more iterations"
        )
    return errors


def codec_for(bundle: Bundle, store: Store, device: torch.device) -> tuple[Codec, CodecErrors]:
    """The bundle's codec, or one that is constructed from the ranges of the main head's actions; and its errors over
    these, in halves of their ranges.

    Raises:
        UserError: it cannot be constructed, or not well enough.
    """
    chunks = torch.from_numpy(np.array(store.maps["chunk"])).flatten(0, 1)  # [S, A]
    both = chunks[:1].repeat(2, 1)  # commands of the gripper, though the data may hold one alone
    both[:, ARM_DIMS] = torch.tensor([-1.0, 1.0])
    actions = bundle.transform().inverse(torch.cat([chunks, both]))
    ranges = Ranges.of(actions)
    if bundle.has("codec"):
        codec = bundle.codec()
        errors = codec_errors(codec, actions, ranges)
    else:
        codec = fit_codec(bundle.config, ranges=ranges)
        errors = check_codec(codec, actions, ranges)
    return codec.requires_grad_(False).eval().to(device), errors


@torch.no_grad()
def codec_errors(codec: Codec, actions: Tensor, ranges: Ranges = UNIT) -> CodecErrors:
    """Reconstruction errors over actions [S, A], in halves of their ranges.

    Raises:
        UserError: one is not finite.
    """
    middle, half = (torch.tensor(values).to(actions) for values in (ranges.middle, ranges.half))
    layers = len(codec.rfsq.layers)
    largest, total, wrong = torch.zeros(3, layers, dtype=torch.float64)
    for part in actions.split(PART):
        tokens = codec.encode(part[:, None])  # [S, 1, D, L]
        closed = part[:, ARM_DIMS] > middle[ARM_DIMS]
        for i in range(layers):
            decoded = codec.decode(tokens, i + 1)[:, 0]
            error = ((decoded - part) / half).abs()
            if not error.isfinite().all():
                raise UserError("the codec's error over the main head's actions is not finite")
            largest[i] = max(float(largest[i]), float(error.max()))
            total[i] += error.double().sum()
            wrong[i] += ((decoded[:, ARM_DIMS] > middle[ARM_DIMS]) != closed).sum()
    mean, wrong = total / actions.numel(), wrong / len(actions)
    return CodecErrors(*(tuple(values.tolist()) for values in (largest, mean, wrong)))


def _share_out(latents: int, actions: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each latent [D]: its action dimension, its offset, and how many latents that dimension has."""
    counts = [latents // actions] * actions
    for dimension in range(latents - sum(counts)):
        counts[dimension] += 1
    for spare in range(3):  # the gripper has two values and needs one latent; the positions get what is left
        if counts[ARM_DIMS] > 1 and counts[spare] < max(OFFSETS):
            counts[ARM_DIMS] -= 1
            counts[spare] += 1
    owner = torch.repeat_interleave(torch.arange(actions), torch.tensor(counts))
    offsets = torch.tensor([offset for count in counts for offset in OFFSETS[count]], dtype=torch.float64)
    return owner, offsets, torch.tensor(counts)[owner]


class _Units(nn.Module):
    """n functions of one variable each: sum_m out[m] * mish(slope[m] * x + bias[m]) + constant."""

    def __init__(self, functions: int, units: int, start: tuple[float, float, float]) -> None:
        super().__init__()
        slope, spread, centre = start
        biases = centre + torch.linspace(-spread, spread, units, dtype=torch.float64)
        self.slope = nn.Parameter(torch.full((functions, units), slope, dtype=torch.float64))
        self.bias = nn.Parameter(biases.repeat(functions, 1))
        self.out = nn.Parameter(torch.zeros(functions, units, dtype=torch.float64))
        self.constant = nn.Parameter(torch.zeros(functions, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, G] -> [n, G]."""
        return (self.out[..., None] * self._hidden(x)).sum(1) + self.constant

    @torch.no_grad()
    def solve(self, x: Tensor, target: Tensor, weight: Tensor) -> None:
        """Sets `out` and `constant` by weighted least squares; x, target and weight are [n, G]."""
        hidden = torch.cat([self._hidden(x), torch.ones_like(x)[:, None]], dim=1)  # [n, units + 1, G]
        system = (hidden * weight[:, None]).transpose(1, 2)
        found = torch.linalg.lstsq(system, (target * weight)[..., None]).solution[..., 0]  # [n, units + 1]
        self.out.copy_(found[:, :-1])
        self.constant.copy_(found[:, -1:])

    def _hidden(self, x: Tensor) -> Tensor:
        return F.mish(self.slope[..., None] * x[:, None] + self.bias[..., None])  # [n, units, G]


def _polish(encode: _Units, x: Tensor, z: Tensor, iterations: int) -> None:
    """L-BFGS on all of the encoder's weights: tanh(encode(x)) should be z, [n, G]."""
    optimiser = torch.optim.LBFGS(
        encode.parameters(), max_iter=iterations, history_size=50, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimiser.zero_grad()
        loss = (encode(x).tanh() - z).square().mean()
        loss.backward()
        return float(loss.detach())

    optimiser.step(closure)
    encode.requires_grad_(False)


def _stretch(codec: Codec, ranges: Ranges) -> None:
    """Folds the ranges into the first layer and the last: the codec was made for [-1, 1]."""
    first, last = codec.encoder[0], codec.decoder[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    middle, half = torch.tensor(ranges.middle), torch.tensor(ranges.half)
    first.weight.div_(half)
    first.bias.sub_(first.weight @ middle)
    last.weight.mul_(half[:, None])
    last.bias.copy_(last.bias * half + middle)


def _place(first: nn.Linear, last: nn.Linear, units: _Units, inputs: Tensor, outputs: Tensor) -> None:
    """Writes the functions into two layers. inputs [n, first's inputs] says what each function reads, outputs
    [last's outputs, n] where it goes."""
    functions, count = units.slope.shape
    used = functions * count
    for layer in (first, last):
        layer.weight.zero_()
        layer.bias.zero_()
    first.weight[:used] = (units.slope[..., None] * inputs[:, None]).flatten(0, 1)
    first.bias[:used] = units.bias.flatten()
    last.weight[:, :used] = (outputs.double()[..., None] * units.out).flatten(1)
    last.bias.copy_(outputs.double() @ units.constant[:, 0])
