"""OpenVLA-OFT's checkpoints as policies, against its authors' own code at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from openvla_folder import HIDDEN, IMAGE, ActionHead, OpenVLA, ProprioProjector, seeded, write_beside, write_folder

from rsd_trt.bundle import Bundle
from rsd_trt.importers.pack import PackRequest, pack
from rsd_trt.models.backbone import PLACEHOLDER, BackboneInputs

DATA = "libero_spatial_no_noops"
PROMPT = (0, 17, 4, 200, 33, 29871)  # the last one is what their code appends
ACTION_TOKENS = 56
# What OpenVLA-OFT's code (213c5ff) gives under its transformers (4.40.1, bc339d9) and timm 0.9.16, in float32, to
# `inputs(images)` with the weights of `OpenVLA(0)`, `seeded(ActionHead(), 1)` and `seeded(ProprioProjector(), 2)`:
# predict_action(ids without 29871, DATA, proprio, proprio_projector, action_head, pixel_values=...), by images: number
# 5 of every eleventh hidden state; actions of the first and the last step, de-normalised.
HIDDEN_STATES = {
    1: [-0.93316287, -3.00762129, -3.17497587, -3.21639681, -3.06564736, -2.95070577],
    2: [-1.87346959, -2.29151392, -2.6449964, -2.73179579, -2.31437707, -2.41470575],
}
ACTIONS = {
    1: [
        [-0.51664388, 0.32725961, -0.97441549, 0.27687002, 0.13482881, 0.36345352, 0.40675229],
        [-0.82486129, 0.31565894, -1.20735014, 0.54386760, 0.10890175, 0.28488011, -0.06574783],
    ],
    2: [
        [-0.15122109, -0.21684038, -0.41586694, 0.81662239, 0.18017102, 0.17009092, -0.13031593],
        [-0.86031056, -0.02549991, -0.85891950, 0.58140446, 0.14270139, 0.43020345, 0.15738434],
    ],
}


def inputs(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """pixel_values [1, 6 * images, side, side] and proprio [8]."""
    generator = torch.Generator().manual_seed(images)
    pixels = torch.randn(1, 6 * images, IMAGE, IMAGE, generator=generator)
    return pixels, torch.rand(8, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the hub has it: the merged model, and the modules beside it with the prefix of their training."""
    path = write_folder(tmp_path_factory.mktemp("hf") / "oft", OpenVLA(0))
    for name, module in (
        ("action_head", seeded(ActionHead(), 1)),
        ("proprio_projector", seeded(ProprioProjector(), 2)),
    ):
        write_beside(path, name, module)
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "oft"
    pack(PackRequest(str(folder), "openvla-oft", out, statistics=DATA))
    return Bundle.open(out)


def fed(images: int) -> BackboneInputs:
    pixels, proprio = inputs(images)
    tokens = torch.tensor([[*PROMPT, *[PLACEHOLDER] * ACTION_TOKENS, 2]])
    size = torch.tensor([tokens.shape[1]])
    return BackboneInputs(pixels.view(1, images, 2, 3, IMAGE, IMAGE), tokens, size, proprio[None])


@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_hidden_states_and_actions_are_the_authors(bundle: Bundle, images: int) -> None:
    hidden = bundle.backbone()(fed(images))
    assert hidden.shape == (1, ACTION_TOKENS, HIDDEN)
    assert hidden[0, ::11, 5].tolist() == pytest.approx(HIDDEN_STATES[images], abs=1e-4)
    normalised = bundle.head()(hidden)[0].numpy()
    q01, q99, arm = -0.5, 0.5, np.arange(7) < 6
    actions = np.where(arm, 0.5 * (normalised + 1) * (q99 - q01 + 1e-8) + q01, normalised)
    assert actions[[0, 7]].tolist() == [pytest.approx(row, abs=1e-4) for row in ACTIONS[images]]
    chunk, finite = bundle.component("predict")(hidden)
    np.testing.assert_allclose(chunk[0, :, :6], actions[:, :6], atol=1e-6)
    np.testing.assert_array_equal(chunk[0, :, 6], -np.sign(2 * actions[:, 6] - 1))
    assert finite.tolist() == [True]


@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_the_transcription_is_the_authors_code_too(bundle: Bundle, images: int) -> None:
    """What other tests compare with: plain modules of the test's own, every number of a chunk."""
    pixels, proprio = inputs(images)
    state = seeded(ProprioProjector(), 2)(proprio)[None, None]
    expected = OpenVLA(0).hidden(list(pixels.split(6, dim=1)), torch.tensor([PROMPT]), state, ACTION_TOKENS)
    assert expected[0, ::11, 5].tolist() == pytest.approx(HIDDEN_STATES[images], abs=1e-4)
    found = bundle.backbone()(fed(images))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(bundle.head()(found)[0], seeded(ActionHead(), 1)(expected), rtol=0, atol=1e-4)
