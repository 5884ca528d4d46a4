"""The constructed codec: exact enough, everywhere, and no louder than its latents."""

from __future__ import annotations

import pytest
import torch

from examples.reference_policy.fit_codec import LARGEST_ERROR, check_codec, codec_errors, fit_codec
from rsd_trt.config import ARM_DIMS
from rsd_trt.errors import UserError
from rsd_trt.models.codec import Codec
from rsd_trt.presets import preset


@pytest.fixture(scope="module")
def codec() -> Codec:
    return fit_codec(preset("reference", "reference"))


@pytest.fixture(scope="module")
def actions() -> torch.Tensor:
    """[S, A], with grippers that are open or closed."""
    actions = torch.rand(5000, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    actions[:, ARM_DIMS] = actions[:, ARM_DIMS].sign()
    return actions


def test_every_action_decodes(codec: Codec, actions: torch.Tensor) -> None:
    errors = check_codec(codec, actions)
    assert errors.largest[-1] < LARGEST_ERROR / 2
    assert errors.mean[-1] < LARGEST_ERROR / 5
    assert set(errors.wrong_grippers) == {0.0}


def test_errors_of_latents_do_not_grow(codec: Codec, actions: torch.Tensor) -> None:
    z = codec.encoder(actions)
    noise = 0.05 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    arm = (codec.decoder(z + noise) - actions)[:, :ARM_DIMS]
    assert arm.square().mean().sqrt() < 1.2 * 0.05


def test_a_bad_codec_is_refused(actions: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = preset("reference", "reference")
    untrained = Codec(config.codec, config.dims)
    assert codec_errors(untrained, actions).largest[-1] > LARGEST_ERROR
    with pytest.raises(UserError, match="the codec is off by up to"):
        check_codec(untrained, actions)
