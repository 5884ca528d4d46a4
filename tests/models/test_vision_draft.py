"""The draft with eyes of its own: its resize, its instruction, its independence, and its export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from rsd_trt.config import CodecConfig, ControlConfig, Quantiles, VisionDraftConfig
from rsd_trt.errors import UserError
from rsd_trt.export.to_onnx import export_onnx
from rsd_trt.models.classifiers import stacked
from rsd_trt.models.codec import Codec, Decoder
from rsd_trt.models.components import ActionTransform, Propose
from rsd_trt.models.vision_draft import Resize, VisionDraft, instruction_rows, resize_matrix
from rsd_trt.presets import byte_tokenizer, preset
from rsd_trt.runtime.preprocess import Preprocessor

TINY = preset("tiny", "tiny")
CONTROL = replace(TINY.control, camera_size=64)
CONFIG = VisionDraftConfig(side=32, patch=8, width=24, blocks=2, heads=2, mlp_width=32, classifier=16, instruction=12)
EMBEDDING = 20
NAN = float("nan")


@pytest.fixture
def propose(randomise: Callable[..., None]) -> Propose:
    draft, codec = VisionDraft(CONFIG, TINY.dims, CONTROL, EMBEDDING), Codec(CodecConfig(), TINY.dims)
    randomise(draft)
    randomise(codec, 1)
    return Propose(draft, Decoder(codec, TINY.dims), ActionTransform(CONTROL, TINY.dims)).eval()


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (rows, 2, 64, 64, 3), generator=generator, dtype=torch.uint8)
    state = torch.randn(rows, 8, generator=generator)
    words = torch.randn(rows, 9, EMBEDDING, generator=generator)
    return frames, state, torch.stack([instruction_rows(row, CONFIG.instruction) for row in words])


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("crop", [1.0, 0.9])
@pytest.mark.parametrize(("frame", "side"), [(256, 128), (100, 32), (32, 32), (24, 32)])
def test_the_resize_is_the_preprocessors_but_for_rounding(rotate: bool, crop: float, frame: int, side: int) -> None:
    control = replace(TINY.control, camera_size=frame, rotate_images=rotate, center_crop=crop)
    backbone = replace(TINY.backbone, image_size=side)
    pixels = Preprocessor(control, backbone, byte_tokenizer(), torch.device("cpu")).pixels
    steps = torch.randint(-9, 10, (2, 2, frame, frame, 3), generator=torch.Generator().manual_seed(0))
    images = (steps.cumsum(2) + 128).clamp(0, 255).byte()
    mean, std = torch.tensor(backbone.towers[0].mean), torch.tensor(backbone.towers[0].std)
    expected = (pixels(images)[:, :, 0].permute(0, 1, 3, 4, 2) * std + mean) * 255
    found = Resize(frame, side, rotate, crop)(images)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2.0  # two roundings, the first of them spread by the second axis
    assert (found - expected).abs().mean() < 0.5


def test_each_pixel_is_an_average() -> None:
    for crop in (1.0, 0.81):
        assert torch.allclose(resize_matrix(200, 64, True, crop).sum(1), torch.ones(64), atol=1e-5)


@torch.no_grad()
def test_state_is_normalised_as_the_preprocessor_does() -> None:
    quantiles = Quantiles(tuple(-1.0 - i for i in range(8)), tuple(2.0 + i for i in range(8)), (True,) * 7 + (False,))
    control = replace(CONTROL, proprio_quantiles=quantiles)
    draft = VisionDraft(CONFIG, TINY.dims, control, EMBEDDING).eval()
    state = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32) * 5
    expected = Preprocessor(control, TINY.backbone, byte_tokenizer(), torch.device("cpu")).proprio(state)
    frames, _, instruction = inputs(5)
    seen = draft.classify(draft.see(draft.resize(frames), torch.from_numpy(expected), instruction)[0])
    torch.testing.assert_close(draft(frames, torch.from_numpy(state), instruction), seen, rtol=1e-4, atol=1e-5)


def test_word_order_counts_and_padding_does_not() -> None:
    draft = VisionDraft(CONFIG, TINY.dims, CONTROL, EMBEDDING).eval()
    pool = draft.instruction
    for count in (9, 12, 31):  # padded, full, averaged in groups
        words = torch.randn(count, EMBEDDING, generator=torch.Generator().manual_seed(count))
        rows = instruction_rows(words, CONFIG.instruction)
        assert rows.shape == (CONFIG.instruction, EMBEDDING)
        swapped = instruction_rows(words[[*range(4), 8, *range(5, 8), 4, *range(9, count)]], CONFIG.instruction)
        assert (pool(rows[None]) - pool(swapped[None])).abs().max() > 1e-4
    short = instruction_rows(words[:5], CONFIG.instruction)
    torch.testing.assert_close(pool(short[None, :5]), pool(short[None]))


@torch.no_grad()
def test_everything_that_it_sees_counts(propose: Propose) -> None:
    given = inputs(1)
    logits = propose.draft(*given)
    for i, tensor in enumerate(given):
        other = list(given)
        other[i] = 255 - tensor if tensor.dtype == torch.uint8 else -tensor
        assert (propose.draft(*other) - logits).abs().max() > 1e-4


@torch.no_grad()
def test_propose_is_its_parts(propose: Propose) -> None:
    given, dims = inputs(3), TINY.dims
    logits = propose.draft(*given)
    tokens, actions, first, finite = propose(*given)
    assert torch.equal(tokens, logits.argmax(-1).view(3, dims.C, dims.T, dims.D).permute(0, 2, 3, 1))
    assert torch.equal(first, logits[:, 0])
    torch.testing.assert_close(actions, propose.transform(propose.decoder(tokens)))
    assert finite.tolist() == [True] * 3
    given[1][1, 0] = NAN
    _, actions, _, finite = propose(*given)
    assert finite.tolist() == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "dynamic"])
@pytest.mark.parametrize("state", [True, False])
@torch.no_grad()
def test_onnx_equals_the_module(batch: str, state: bool, tmp_path: Path, propose: Propose) -> None:
    import onnxruntime

    given = inputs(1 if batch == "1" else 3)
    if not state:
        draft = VisionDraft(replace(CONFIG, state=False), TINY.dims, CONTROL, EMBEDDING)
        propose = Propose(draft, propose.decoder, propose.transform).eval()
        given = (given[0], given[2])  # type: ignore[assignment]
    expected = propose(*given)
    export_onnx(stacked(propose), batch, tmp_path / "propose.onnx")  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(str(tmp_path / "propose.onnx"), providers=["CPUExecutionProvider"])
    signature = propose.signature
    assert next((x.name, x.type) for x in session.get_inputs()) == ("frames", "tensor(uint8)")
    found = session.run(None, {port.name: x.numpy() for port, x in zip(signature.inputs, given, strict=True)})
    for port, a, b in zip(signature.outputs, found, expected, strict=True):
        assert a.shape == signature.shape(port, len(given[0]))
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-4, err_msg=port.name)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"draft\.side 30 must be a multiple of draft\.patch 16"):
        VisionDraftConfig(side=30)


def test_nothing_of_it_that_is_constant_is_in_a_checkpoint() -> None:
    names = VisionDraft(CONFIG, TINY.dims, ControlConfig(), EMBEDDING).state_dict()
    assert not [name for name in names if "matrix" in name or name.startswith("state_")]
