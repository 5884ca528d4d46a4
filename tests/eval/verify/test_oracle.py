"""The oracle: the same weights, shared, in other people's code, give the same hidden state."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from msgspec import structs
from timm_double import TimmDouble

from rsd_trt.config import PROPRIO_DIM, BackboneConfig
from rsd_trt.errors import Unavailable
from rsd_trt.eval.verify import oracle
from rsd_trt.eval.verify.oracle import Oracle
from rsd_trt.models.backbone import Backbone, BackboneInputs, rope_tables
from rsd_trt.presets import preset

TINY = preset("tiny", "tiny").backbone
GRIP = structs.replace(  # another GELU, another rotary base, no proprioception token
    TINY,
    proprio=False,
    towers=tuple(structs.replace(tower, gelu="tanh", prefix_tokens=1) for tower in TINY.towers),
    language=structs.replace(TINY.language, rope_theta=5e3),
)


@pytest.fixture(autouse=True)
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("timm") is None:
        monkeypatch.setattr(oracle, "timm_tower", TimmDouble)


def make_inputs(config: BackboneConfig, lengths: list[int], images: int) -> BackboneInputs:
    generator = torch.Generator().manual_seed(0)
    rows, side = len(lengths), config.image_size
    return BackboneInputs(
        pixels=torch.randn(rows, images, len(config.towers), 3, side, side, generator=generator),
        tokens=torch.randint(1, config.language.vocab, (rows, max(lengths)), generator=generator),
        lengths=torch.tensor(lengths),
        proprio=torch.randn(rows, PROPRIO_DIM, generator=generator) if config.proprio else None,
    )


@pytest.mark.parametrize("config", [TINY, GRIP], ids=["tiny", "grip"])
@pytest.mark.parametrize(("lengths", "images"), [([5], 1), ([3, 9, 6], 2)])
@torch.no_grad()
def test_it_computes_what_the_backbone_computes(
    config: BackboneConfig, lengths: list[int], images: int, randomise: Callable[..., None]
) -> None:
    backbone = Backbone(config)
    randomise(backbone)
    backbone.requires_grad_(False).eval()
    found, inputs = Oracle(backbone), make_inputs(config, lengths, images)
    stream, last = backbone.embed(inputs)
    patches = images * (config.image_size // config.towers[0].patch) ** 2
    vision = found.vision(inputs.pixels)
    assert vision.shape == (len(lengths), patches, sum(tower.width for tower in config.towers))
    torch.testing.assert_close(found.embed(inputs), stream, rtol=1e-5, atol=5e-4)  # of numbers up to 300
    torch.testing.assert_close(oracle.last_positions(inputs, stream), last)
    states, rope = found.states(stream), rope_tables(config.language, stream)
    expected, ours = backbone(inputs), stream
    for block, state in zip(backbone.llama.layers, states, strict=False):
        torch.testing.assert_close(state, ours, rtol=1e-5, atol=1e-4)
        ours = block(ours, rope)
    torch.testing.assert_close(found.hidden(inputs), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(states[-1][torch.arange(len(last)), last], expected, rtol=1e-5, atol=1e-4)


def test_it_shares_the_weights() -> None:
    backbone = Backbone(TINY)
    theirs = {value.data_ptr() for value in backbone.parameters()}
    found = Oracle(backbone)
    ours = [value for module in (*found.towers, found.llama) for value in module.parameters()]
    assert all(value.data_ptr() in theirs for value in ours)
    assert not [buffer for buffer in found.llama.buffers() if buffer.is_meta]


@pytest.mark.parametrize("package", ["timm.models.vision_transformer", "transformers"])
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.undo()  # of the stand-in
    monkeypatch.setitem(sys.modules, package, None)
    if package == "transformers":
        monkeypatch.setattr(oracle, "timm_tower", TimmDouble)
    else:
        monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(Unavailable, match=r"^(timm|transformers)\S* is not installed. Install it: pip install timm"):
        Oracle(Backbone(TINY))
