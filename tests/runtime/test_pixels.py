"""OpenVLA's pixels: against TensorFlow's own numbers, and on LIBERO's frames against PIL and NumPy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.config import Resampling
from rsd_trt.errors import Unavailable
from rsd_trt.eval.libero.simulator import Simulator
from rsd_trt.eval.verify.oracle import LEVELS, pil_pixels
from rsd_trt.presets import byte_tokenizer, conventions, preset
from rsd_trt.runtime.preprocess import Preprocessor

SIZE = 224
OFT = conventions("openvla-oft")
TINY = structs.replace(preset("tiny", "tiny").backbone, image_size=SIZE)
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
PLAIN = structs.replace(TINY, towers=tuple(structs.replace(tower, **UNIT) for tower in TINY.towers), image_size=SIZE)
# `frame()` behind OpenVLA-OFT's `resize_image_for_policy` (on the rotated frame) and `center_crop_image`, rows and
# columns 16, 64, 112, 160, 208: computed by TensorFlow 2.21 with
#   x = tf.io.decode_image(tf.image.encode_jpeg(frame()[::-1, ::-1]), expand_animations=False)
#   x = tf.round(tf.image.resize(x, (224, 224), "lanczos3", antialias=True))
#   x = tf.cast(tf.clip_by_value(x, 0, 255), tf.uint8)
#   low = (1 - 0.9**0.5) / 2
#   x = tf.image.convert_image_dtype(x, tf.float32)[None]
#   x = tf.image.crop_and_resize(x, [[low, low, 1 - low, 1 - low]], [0], (224, 224))[0]
#   tf.image.convert_image_dtype(tf.clip_by_value(x, 0, 1), tf.uint8, saturate=True)[16::48, 16::48]
GOLDEN = [
    [[68, 97, 158], [82, 101, 89], [99, 115, 147], [85, 108, 156], [29, 83, 141]],
    [[73, 103, 99], [57, 154, 179], [47, 129, 148], [56, 97, 76], [48, 109, 109]],
    [[75, 141, 134], [127, 139, 141], [91, 86, 94], [54, 46, 149], [51, 72, 104]],
    [[82, 60, 128], [41, 103, 112], [64, 99, 105], [103, 115, 82], [82, 73, 81]],
    [[117, 121, 123], [97, 69, 107], [99, 88, 54], [80, 34, 93], [52, 88, 48]],
]


def frame() -> NDArray[np.uint8]:
    random = np.random.default_rng(0)
    blocks = np.kron(random.integers(0, 256, (32, 32, 3)), np.ones((8, 8, 1), int))
    y, x = np.mgrid[:256, :256]
    return ((3 * blocks + x[..., None] + y[..., None] * np.array([0, 1, 2])) // 7 % 256).astype(np.uint8)


def levels(images: NDArray[np.uint8], resampling: Resampling = "lanczos3") -> NDArray[np.float32]:
    """[n, 256, 256, 3] -> [n, 224, 224, 3] in 0..255."""
    control = structs.replace(OFT, resampling=resampling)
    pixels = Preprocessor(control, PLAIN, byte_tokenizer(), torch.device("cpu")).pixels(torch.from_numpy(images[None]))
    return (pixels[0, :, 0] * LEVELS).permute(0, 2, 3, 1).numpy()


def test_pixels_equal_tensorflows() -> None:
    found = levels(frame()[None])[0][16::48, 16::48]
    assert np.abs(found - np.array(GOLDEN)).max() <= 1e-3


def test_the_golden_values_tell_the_ways_apart() -> None:
    assert np.abs(levels(frame()[None], "bicubic")[0][16::48, 16::48] - np.array(GOLDEN)).mean() > 1


@pytest.mark.parametrize("package", ["PIL", "simplejpeg"])
def test_without_a_jpeg_library_there_is_one_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match=rf"{package} is not installed"):
        levels(frame()[None])


@pytest.mark.libero
def test_on_liberos_frames() -> None:
    simulator = Simulator("libero_10", 2, OFT)
    simulator.reset(0)
    images = simulator.observation().images
    simulator.close()
    expected = [pil_pixels(image, OFT, PLAIN)[0].permute(1, 2, 0).numpy() * LEVELS for image in images]
    error = np.abs(levels(images) - np.stack(expected))
    assert error.mean() < 0.01  # the bar is 0.5; one level where a rounding fell otherwise
    assert error.max() < 2
