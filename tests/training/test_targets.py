"""Self-corrected targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsd_trt.config import CodecConfig, Dims
from rsd_trt.models.codec import Codec
from rsd_trt.training.codec import SCALE_RATIO
from rsd_trt.training.targets import corrected_targets, decode_z, layer_losses, total_loss

DIMS = Dims()
SHAPE = (DIMS.T, DIMS.D)


@pytest.fixture
def codec() -> Codec:
    torch.manual_seed(0)
    codec = Codec(CodecConfig(), DIMS)
    assert codec.rfsq.scales is not None
    codec.rfsq.scales.copy_(SCALE_RATIO ** torch.arange(DIMS.L))
    return codec.requires_grad_(False)


@pytest.fixture
def z() -> Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def logits_of(tokens: Tensor) -> Tensor:
    """[B, n, T*D] -> logits [B, n, T*D, K] that choose them."""
    return F.one_hot(tokens, DIMS.K).float()


def test_right_choices_give_plain_tokens(codec: Codec, z: Tensor) -> None:
    plain = codec.rfsq.quantise(z)[1]  # [B, T, D, L]
    tokens = plain.flatten(1, 2).transpose(1, 2)  # [B, L, T*D]
    assert torch.equal(corrected_targets(z, logits_of(tokens), codec.rfsq.table()), tokens)
    assert torch.allclose(decode_z(tokens, codec.rfsq.table(), SHAPE), codec.rfsq.lookup(plain))


def test_a_neighbouring_first_choice_is_made_good(codec: Codec, z: Tensor) -> None:
    table = codec.rfsq.table()
    nearest = corrected_targets(z, logits_of(torch.zeros(3, 1, DIMS.T * DIMS.D, dtype=torch.int64)), table)[:, 0]
    tokens = torch.zeros(3, DIMS.L, DIMS.T * DIMS.D, dtype=torch.int64)
    left = z.flatten(1) - table[0][nearest]
    tokens[:, 0] = (nearest + torch.where(left > 0, 1, -1)).clamp(0, DIMS.K - 1)  # the second nearest
    for i in range(1, DIMS.L):
        tokens[:, i] = corrected_targets(z, logits_of(tokens), table)[:, i]
    finest = float(table[-1, 1] - table[-1, 0])
    assert (decode_z(tokens, table, SHAPE) - z).abs().max() < finest
    assert not torch.equal(tokens[:, 0], nearest)


def test_the_coarse_layers_alone_are_bounded(codec: Codec, z: Tensor) -> None:
    plain = codec.rfsq.quantise(z)[1].flatten(1, 2).transpose(1, 2)
    for n in range(1, DIMS.L + 1):
        bound = SCALE_RATIO ** (n - 1) / (DIMS.K - 1) + 1e-6
        assert (decode_z(plain[:, :n], codec.rfsq.table(), SHAPE) - z).abs().max() <= bound


def test_losses_are_cross_entropy(codec: Codec, z: Tensor) -> None:
    logits = torch.zeros(3, DIMS.C, DIMS.T * DIMS.D, DIMS.K)
    losses = layer_losses(logits, corrected_targets(z, logits, codec.rfsq.table()), DIMS.T)
    chance = torch.tensor(float(DIMS.K)).log()
    assert torch.allclose(losses, chance.expand(DIMS.C))
    assert torch.allclose(total_loss(losses), chance)
