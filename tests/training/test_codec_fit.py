"""The constructed codec: exact enough, everywhere, and no louder than its latents."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from rsd_trt.config import ARM_DIMS
from rsd_trt.errors import UserError
from rsd_trt.models.codec import Codec
from rsd_trt.presets import preset
from rsd_trt.training.codec import LARGEST_ERROR, Ranges, check_codec, codec_errors, fit_codec


@pytest.fixture(scope="module")
def codec() -> Codec:
    return fit_codec(preset("reference", "reference"))


@pytest.fixture(scope="module")
def actions() -> torch.Tensor:
    """[S, A], with grippers that are open or closed."""
    actions = torch.rand(5000, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    actions[:, ARM_DIMS] = actions[:, ARM_DIMS].sign()
    return actions


def test_every_action_decodes(codec: Codec, actions: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = check_codec(codec, actions)
    monkeypatch.setattr("rsd_trt.training.codec.PART", 999)
    in_parts = check_codec(codec, actions)
    assert in_parts.largest == errors.largest and in_parts.mean == pytest.approx(errors.mean)
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
    with pytest.raises(UserError, match="error over the main head's actions is not finite"):
        codec_errors(untrained, actions.where(actions != actions.max(), torch.nan))


@pytest.mark.parametrize("gripper", [(0.0, 1.0), (-1.0, 1.0)])
def test_the_ranges_of_the_actions_are_the_codecs(gripper: tuple[float, float]) -> None:
    random = torch.Generator().manual_seed(0)
    wide = torch.tensor([0.2, 3.0, 1.0, 0.01, 0.5, 1.0])
    actions = torch.cat([(torch.rand(2000, 6, generator=random) - 0.3) * wide, torch.zeros(2000, 1)], dim=1)
    actions[:, ARM_DIMS] = torch.where(torch.rand(2000, generator=random) > 0.5, *gripper)
    ranges = Ranges.of(actions)
    codec = fit_codec(preset("tiny", "tiny"), ranges=ranges)
    errors = check_codec(codec, actions, ranges)
    assert errors.largest[0] > 5 * errors.largest[2] > 5 * errors.largest[-1]
    off = (codec.decode(codec.encode(actions[:, None]))[:, 0] - actions).abs().amax(0)
    assert (off[:ARM_DIMS] < LARGEST_ERROR * wide).all() and off[ARM_DIMS] < LARGEST_ERROR


def test_sizes_that_no_codec_can_have_are_refused() -> None:
    config = preset("tiny", "tiny")
    for changes in ({"dims": replace(config.dims, D=6)}, {"codec": replace(config.codec, scale="plain")}):
        with pytest.raises(UserError, match="no codec can be constructed"):
            fit_codec(replace(config, **changes))
