"""The RFSQ codec: exact round trips, error bounds, and golden codes."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from rsd_trt.bundle import save
from rsd_trt.config import CodecConfig, Dims
from rsd_trt.models.codec import Codec, Decoder, Quantiser, QuantiserLayer
from rsd_trt.presets import byte_tokenizer, preset

DIMS = Dims()
SCALES = ("static", "plain", "layernorm")
numbers = st.floats(-1, 1, width=32)
# ActionRFSQAE of the original experiment.
ORIGINAL = {
    "encoder.0.weight": (64, 7),
    "encoder.0.bias": (64,),
    "encoder.2.weight": (16, 64),
    "encoder.2.bias": (16,),
    **{f"rfsq.layers.{i}.boundaries": (7,) for i in range(8)},
    "decoder.0.weight": (64, 16),
    "decoder.0.bias": (64,),
    "decoder.2.weight": (7, 64),
    "decoder.2.bias": (7,),
}


def seeded(scale: str = "static") -> Codec:
    torch.manual_seed(0)
    return Codec(CodecConfig(scale=scale), DIMS).requires_grad_(False).eval()  # type: ignore[arg-type]


def ramp() -> torch.Tensor:
    return torch.linspace(-1, 1, DIMS.T * DIMS.A).view(1, DIMS.T, DIMS.A)


@pytest.mark.parametrize(("scale", "extra"), [("plain", {}), ("layernorm", {}), ("static", {"rfsq.scales": (8,)})])
def test_names_and_shapes_are_the_originals(scale: str, extra: dict[str, tuple[int, ...]]) -> None:
    state = seeded(scale).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == ORIGINAL | extra
    assert torch.equal(state["rfsq.layers.7.boundaries"], torch.linspace(-1, 1, 7))


@pytest.mark.parametrize("scale", ["static", "plain"])
@given(data=st.lists(numbers, min_size=DIMS.T * DIMS.A, max_size=DIMS.T * DIMS.A))
def test_decoding_what_was_encoded_is_exactly_the_forward(scale: str, data: list[float]) -> None:
    codec, x = seeded(scale), torch.tensor(data).view(1, DIMS.T, DIMS.A)
    tokens = codec.encode(x)
    assert tokens.shape == (1, DIMS.T, DIMS.D, DIMS.L)
    assert tokens.dtype == torch.int64
    assert torch.equal(codec.decode(tokens), codec(x))


@given(z=st.lists(numbers, min_size=1, max_size=64))
def test_the_error_after_n_layers_is_bounded_by_the_scales_and_never_grows(z: list[float]) -> None:
    latent = torch.tensor(z)
    quantiser = Quantiser(CodecConfig(), DIMS)
    tokens = quantiser.quantise(latent)[1]
    before = latent.abs()
    for n in range(1, DIMS.L + 1):
        error = (latent - quantiser.lookup(tokens[..., :n])).abs()
        half_a_level = 1 / (DIMS.K - 1)
        assert error.max() <= half_a_level * quantiser.scales[n - 1] + 3e-7
        assert (error <= before + 3e-7).all()
        before = error


def test_the_typical_error_falls_by_the_scale_of_each_layer() -> None:
    latent = torch.linspace(-1, 1, 10_001)
    quantiser = Quantiser(CodecConfig(), DIMS)
    tokens = quantiser.quantise(latent)[1]
    errors = [(latent - quantiser.lookup(tokens[..., :n])).abs().mean() for n in range(1, 6)]
    for coarse, fine in itertools.pairwise(errors):
        assert fine / coarse == pytest.approx(1 / 6, rel=0.05)


def test_a_prefix_of_layers_decodes_to_the_coarse_action() -> None:
    codec = seeded()
    tokens = codec.encode(ramp())
    for n in (1, DIMS.C, DIMS.L):
        assert torch.equal(codec.decode(tokens, layers=n), codec.decode(tokens[..., :n]))
    errors = [(codec.decode(tokens, layers=n) - codec(ramp())).abs().max() for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize(
    ("r", "index"),
    [(-1.0, 0), (-0.75, 0), (-0.74, 1), (-0.25, 1), (0.0, 2), (0.25, 2), (0.26, 3), (0.75, 3), (9.0, 4), (-9.0, 0)],
)
def test_the_nearest_of_five_levels_and_the_lower_of_two(r: float, index: int) -> None:
    assert QuantiserLayer(5).nearest(torch.tensor([r])).tolist() == [index]


@pytest.mark.parametrize(
    ("scale", "golden"),
    [
        ("static", [[4, 2, 5, 5, 5, 5, 5, 5], [0, 3, 3, 3, 3, 3, 3, 3]]),
        ("plain", [[4, 3, 3, 3, 3, 3, 3, 3], [0, 3, 3, 3, 3, 3, 3, 3]]),
    ],
)
def test_golden_codes_of_the_quantiser(scale: str, golden: list[list[int]]) -> None:
    """By hand: 0.3 = 1/3 - (1/3)/6 + (2/3)/36 + (2/3)/216 + ... A quantiser that fails this misreads old codes."""
    quantiser = Quantiser(CodecConfig(scale=scale), DIMS)  # type: ignore[arg-type]
    tokens = quantiser.quantise(torch.tensor([0.3, -1.0]))[1]
    assert tokens.tolist() == golden


def test_golden_codes_of_a_seeded_codec() -> None:
    """Regenerate: print the left sides. Deeper layers than four would pin the rounding of a matrix product."""
    codec = seeded()
    assert codec.encode(ramp())[0, 0, :3, :4].tolist() == [[3, 4, 2, 2], [3, 5, 6, 1], [2, 4, 4, 2]]
    tokens = (torch.arange(DIMS.D * DIMS.L) % DIMS.K).view(1, 1, DIMS.D, DIMS.L)
    golden = [0.07795, -0.07735, 0.13971, -0.03913, 0.13963, 0.13894, -0.18449]
    assert codec.decode(tokens)[0, 0].tolist() == pytest.approx(golden, abs=1e-4)


def test_index_only_decoding_is_lossless_but_for_layernorm() -> None:
    assert [seeded(scale).round_trip_error() for scale in ("static", "plain")] == [0.0, 0.0]
    assert seeded("layernorm").round_trip_error() > 0.1


def test_the_layernorm_variant_normalises_each_residual_and_decodes_raw_levels() -> None:
    codec = seeded("layernorm")
    residual, total, codes = codec.encoder(ramp()), 0, []
    for _ in range(DIMS.L):
        mean, std = residual.mean(-1, keepdim=True), residual.std(-1, keepdim=True) + 1e-5
        codes.append(torch.cdist(((residual - mean) / std).reshape(-1, 1), torch.linspace(-1, 1, 7)[:, None]).argmin(1))
        step = torch.linspace(-1, 1, 7)[codes[-1]].view_as(residual) * std + mean
        total, residual = total + step, residual - step
    tokens = torch.stack(codes, -1).view(1, DIMS.T, DIMS.D, DIMS.L)
    assert torch.equal(codec.encode(ramp()), tokens)
    torch.testing.assert_close(codec(ramp()), codec.decoder(total))
    raw = torch.linspace(-1, 1, 7)[tokens].sum(-1)
    torch.testing.assert_close(codec.decode(tokens), codec.decoder(raw))


@pytest.mark.parametrize("scale", SCALES)
def test_loading_warns_about_a_layernorm_codec_only(
    scale: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = structs.replace(preset("tiny", "tiny"), codec=CodecConfig(scale=scale))  # type: ignore[arg-type]
    bundle = save(tmp_path / "tiny", config, {"codec": seeded(scale)}, byte_tokenizer())
    with caplog.at_level(logging.WARNING):
        bundle.codec()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (scale == "layernorm")
    assert all("layernorm" in text and "0.32" in text for text in warnings)


def test_the_decoder_is_the_codecs_decoding_half() -> None:
    codec = seeded()
    decoder, tokens = Decoder(codec, DIMS), codec.encode(ramp())
    assert tokens.shape == decoder.signature.shape(decoder.signature.inputs[0], 1)
    actions = decoder(tokens)
    assert actions.shape == decoder.signature.shape(decoder.signature.outputs[0], 1)
    torch.testing.assert_close(actions, codec.decode(tokens))
