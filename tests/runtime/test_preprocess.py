"""From what a robot sees to what the backbone reads, against PIL and by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from msgspec import structs
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from rsd_trt.config import PROPRIO_DIM, BackboneConfig, ControlConfig, Quantiles
from rsd_trt.errors import UserError
from rsd_trt.presets import byte_tokenizer, preset
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor, fit_frames

TINY = preset("tiny", "tiny").backbone
Pixels = NDArray[np.uint8]
Observe = Callable[..., Observation]


def preprocessor(
    control: ControlConfig | None = None, backbone: BackboneConfig = TINY, tokenizer: Tokenizer | None = None
) -> Preprocessor:
    return Preprocessor(control or ControlConfig(), backbone, tokenizer or byte_tokenizer(), torch.device("cpu"))


def noise(side: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def checkerboard(side: int) -> Pixels:
    y, x = np.mgrid[:side, :side]
    return np.repeat(((x // 8 + y // 8) % 2 * 255)[..., None], 3, -1).astype(np.uint8)


def pil(image: Pixels, rotate: bool, crop: float, size: int) -> NDArray[np.float64]:
    """The same with PIL: rotate, keep the centre, resize."""
    picture = Image.fromarray(image)
    picture = picture.rotate(180) if rotate else picture
    side = picture.width
    keep = round(side * crop**0.5)
    left = (side - keep) // 2
    picture = picture.crop((left, left, left + keep, left + keep)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture).astype(np.float64)


@pytest.mark.parametrize("picture", [noise, checkerboard])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(
    ("side", "crop", "size", "levels"),
    [(256, 1.0, 128, 0), (256, 0.9, 224, 1), (256, 0.9, 32, 1), (64, 0.25, 32, 0), (32, 1.0, 32, 0)],
)
def test_pixels_equal_pils(
    picture: Callable[[int], Pixels], rotate: bool, side: int, crop: float, size: int, levels: int
) -> None:
    control = ControlConfig(rotate_images=rotate, center_crop=crop, camera_size=side)
    images = np.stack([picture(side), picture(side)[::-1]])
    backbone = structs.replace(TINY, image_size=size)
    pixels = preprocessor(control, backbone).pixels(torch.from_numpy(images[None].copy()))
    assert pixels.shape == (1, 2, len(TINY.towers), 3, size, size)
    for camera, image in enumerate(images):
        expected = pil(image, rotate, crop, size)
        for tower, config in enumerate(TINY.towers):
            values = pixels[0, camera, tower].permute(1, 2, 0).double().numpy()
            values = (values * np.array(config.std) + np.array(config.mean)) * 255
            assert np.abs(values - expected).max() <= levels + 1e-3


def test_rotation_is_by_180_degrees() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[0, 1] = (10, 20, 30)
    pixels = preprocessor(ControlConfig(rotate_images=True)).pixels(torch.from_numpy(image[None, None]))[0, 0, 1]
    values = (pixels * 0.5 + 0.5) * 255
    assert values[:, 31, 30].tolist() == pytest.approx([10, 20, 30], abs=1e-3)
    assert values.sum() == pytest.approx(60, abs=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pixels_have_the_backbones_dtype(dtype: str, observe: Observe) -> None:
    process = preprocessor(backbone=structs.replace(TINY, dtype=dtype))  # type: ignore[arg-type]
    assert process([observe(ControlConfig())]).pixels.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("control", "instruction", "text"),
    [
        (ControlConfig(), "Lift It", "In: What action should the robot take to lift it?\nOut:"),
        (ControlConfig(lowercase=False), "Lift It", "In: What action should the robot take to Lift It?\nOut:"),
        (ControlConfig(prompt="{instruction}"), "put {x} in {instruction}", "put {x} in {instruction}"),
    ],
)
def test_prompts(control: ControlConfig, instruction: str, text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = preprocessor(control, tokenizer=tokenizer).prompt_tokens(instruction)
    assert ids[0] == tokenizer.token_to_id("<s>") == 0
    assert ids == tokenizer.encode(text).ids
    assert len(ids) == 1 + len(text.encode())


@pytest.mark.parametrize(("suffix", "added"), [(None, []), (300, [300]), ("last", [])])
def test_the_suffix_token_is_added_unless_it_is_there(suffix: int | str | None, added: list[int]) -> None:
    plain = preprocessor().prompt_tokens("go")
    token = plain[-1] if suffix == "last" else suffix
    control = ControlConfig(suffix_token=token)  # type: ignore[arg-type]
    assert preprocessor(control).prompt_tokens("go") == [*plain, *added]


def test_a_token_that_the_backbone_does_not_know() -> None:
    with pytest.raises(UserError, match=r"gives the id 320, backbone\.language\.vocab is 320"):
        preprocessor(ControlConfig(suffix_token=320)).prompt_tokens("go")


def test_a_batch_is_padded_on_the_right(observe: Observe) -> None:
    process, control = preprocessor(), ControlConfig()
    short, long = observe(control, 0, "go"), observe(control, 1, "go there")
    batch = process([short, long])
    assert batch.tokens.dtype == batch.lengths.dtype == torch.int64
    assert (batch.lengths[1] - batch.lengths[0]).item() == len(" there") == batch.tokens[0].eq(0).sum() - 1
    assert batch.proprio is not None
    for row, observation in enumerate((short, long)):
        alone = process([observation])
        assert alone.proprio is not None
        assert batch.tokens[row, : batch.lengths[row]].tolist() == alone.tokens[0].tolist()
        assert torch.equal(batch.pixels[row], alone.pixels[0])
        assert torch.equal(batch.proprio[row], alone.proprio[0])


def test_proprio_is_normalised_where_the_mask_is_true_and_clipped_everywhere() -> None:
    quantiles = Quantiles(
        q01=(0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 2.0),
        q99=(2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 4.0, 4.0),
        mask=(True, True, True, True, True, False, True, True),
    )
    control = ControlConfig(proprio_quantiles=quantiles)
    raw = np.array([0.5, 2, 0, 9, -9, 2.5, 3, 2], np.float32)
    images = np.zeros((2, 256, 256, 3), np.uint8)
    out = preprocessor(control)([Observation(images, raw, "go")]).proprio
    assert out is not None
    assert out.dtype == torch.float32
    assert out[0].tolist() == pytest.approx([-0.5, 1, 0, 1, -1, 1, 0.5, -1], abs=1e-6)
    untouched = preprocessor()([Observation(images, raw, "go")]).proprio
    assert untouched is not None
    assert untouched[0].tolist() == raw.tolist()


def test_a_backbone_that_reads_no_state_needs_none(observe: Observe) -> None:
    blind = preprocessor(backbone=structs.replace(TINY, proprio=False))
    observation = dataclasses.replace(observe(ControlConfig()), proprio=None)  # type: ignore[arg-type]
    assert blind([observation]).proprio is None


def test_without_a_proprioception_token_there_is_none(observe: Observe) -> None:
    blind = preprocessor(backbone=structs.replace(TINY, proprio=False))
    assert blind([observe(ControlConfig())]).proprio is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": np.zeros((1, 256, 256, 3), np.uint8)},
            r"uint8 \[1, 256, .* takes uint8 \[2, 256, 256, 3\]",
        ),
        ({"images": np.zeros((2, 480, 640, 3), np.uint8)}, r"\[2, 480, 640, 3\].* of 256 x 256, .*have them resized"),
        ({"images": np.zeros((2, 3, 256, 256), np.uint8)}, r"\[2, 3, 256, 256\]"),
        ({"images": np.zeros((2, 256, 256, 3), np.float32)}, "images are float32"),
        ({"images": [[0]]}, "images are list"),
        (
            {"proprio": np.zeros(PROPRIO_DIM - 1, np.float32)},
            r"proprio is float32 \[7\], .* takes float32 \[8\]",
        ),
        ({"proprio": np.zeros((1, PROPRIO_DIM), np.float32)}, r"proprio is float32 \[1, 8\]"),
        ({"proprio": np.array([0, 0, 0, np.inf, 0, 0, 0, 0])}, r"proprio\[3\] is not finite"),
        ({"proprio": None}, "the observation has no proprio"),
        ({"instruction": 3}, "instruction is of type int, not a string"),
    ],
)
def test_what_the_bundle_does_not_take_is_refused(changes: dict[str, object], message: str, observe: Observe) -> None:
    observation = dataclasses.replace(observe(ControlConfig()), **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        preprocessor()([observation])


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (480, 640), (7, 7), (32, 32)])
@pytest.mark.parametrize("rule", ["resize-naive", "letterbox"])
def test_frames_of_another_size_are_resized_as_pil_does(height: int, width: int, rule: str) -> None:
    control, mean = ControlConfig(camera_size=32, resize=rule), (0.485, 0.456, 0.406)  # type: ignore[arg-type]
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    found = fit_frames(frames, control, mean)
    assert (found.shape, found.dtype) == ((2, 32, 32, 3), np.uint8)
    for frame, one in zip(frames, found, strict=True):
        image = Image.fromarray(frame)
        if rule == "letterbox":
            square = Image.new("RGB", (max(height, width),) * 2, tuple(int(255 * x) for x in mean))  # type: ignore[arg-type]
            square.paste(image, ((max(height, width) - width) // 2, (max(height, width) - height) // 2))
            image = square
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(one - expected).max() <= 1


@pytest.mark.parametrize("frames", [np.zeros((2, 0, 5, 3), np.uint8), np.zeros((4, 4, 3), np.uint8), None])
def test_what_are_no_frames_cannot_be_resized(frames: object) -> None:
    with pytest.raises(UserError, match=r"images are |cannot be resized"):
        fit_frames(frames, ControlConfig(), (0.5, 0.5, 0.5))  # type: ignore[arg-type]
