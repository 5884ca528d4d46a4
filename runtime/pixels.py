"""Camera frames -> pixels of the backbone's size, in 0..255, by the two ways that `control.resampling` names.

`bicubic` keeps whole pixels of the middle and resizes them as PIL does. `lanczos3` is what OpenVLA and OpenVLA-OFT feed
on LIBERO, which TensorFlow computes there: an antialiased Lanczos-3 to size, then the middle sampled bilinearly onto
the same size, corner to corner. Of a known size either step is one constant matrix for both axes, rows @ image @
rows^T, and a rounding to 8 bits.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rsd_trt.config import ControlConfig
from rsd_trt.errors import missing_extra

LOBES = 3  # of Lanczos' kernel, to either side
LEVELS = 255.0  # of an 8-bit channel


class Bicubic(nn.Module):
    """Frames [n, 3, F, F] in 0..255 -> [n, 3, size, size]: the middle by whole pixels, then PIL's bicubic resize."""

    def __init__(self, control: ControlConfig, size: int) -> None:
        super().__init__()
        self.keep = round(control.camera_size * math.sqrt(control.center_crop))
        self.start = (control.camera_size - self.keep) // 2
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        start, end = self.start, self.start + self.keep
        x = x[:, :, start:end, start:end].float()
        return x if self.keep == self.size else resize(x, self.size)


class Lanczos(nn.Module):
    """Frames [n, 3, F, F] in 0..255 -> [n, 3, size, size]: antialiased Lanczos-3, then the middle by fractions of a
    pixel.

    Non-obvious: after the crop TensorFlow converts to 8 bits by floor(255.5 x) of x in [0, 1], which is darker by a
    quarter of a level in the mean than rounding.
    """

    to_size: Tensor
    crop: Tensor

    def __init__(self, control: ControlConfig, size: int) -> None:
        super().__init__()
        self.register_buffer("to_size", lanczos_matrix(control.camera_size, size), persistent=False)
        self.register_buffer("crop", crop_matrix(size, control.center_crop), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.to_size @ x.float() @ self.to_size.T).round().clamp(0, LEVELS)
        x = (self.crop @ x @ self.crop.T).clamp(0, LEVELS)
        return (x * ((LEVELS + 0.5) / LEVELS)).floor()


def resampling(control: ControlConfig, size: int) -> nn.Module:
    """Frames of `control.camera_size` in 0..255 -> pixels of `size`."""
    return (Lanczos if control.resampling == "lanczos3" else Bicubic)(control, size)


def resize(x: Tensor, size: int) -> Tensor:
    """Antialiased bicubic resize of x [n, 3, S, S] in 0..255, as PIL does it: first across, then down, each time
    rounded and clipped to 8 bits. Without that the overshoot beside sharp edges comes out differently."""
    for shape in ((x.shape[-2], size), (size, size)):
        x = (F.interpolate(x, shape, mode="bicubic", antialias=True) + 0.5).floor().clamp(0, 255)
    return x


def lanczos_matrix(frame: int, size: int) -> Tensor:
    """[size, frame]: TensorFlow's `tf.image.resize(method="lanczos3", antialias=True)` along one axis. Smaller sizes
    widen the kernel; the weights that lie on the frame are normalised."""
    scale = frame / size
    centres = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
    distance = (torch.arange(frame, dtype=torch.float64) + 0.5 - centres) / max(scale, 1.0)
    weights = torch.sinc(distance) * torch.sinc(distance / LOBES) * (distance.abs() < LOBES)
    return (weights / weights.sum(1, keepdim=True)).float()


def crop_matrix(size: int, area: float) -> Tensor:
    """[size, size]: the middle sqrt(area) of an axis, sampled bilinearly at `size` points from corner to corner, as
    TensorFlow's `tf.image.crop_and_resize`."""
    side = math.sqrt(area)
    at = ((1 - side) / 2 + side * torch.linspace(0, 1, size, dtype=torch.float64)) * (size - 1)
    distance = (torch.arange(size, dtype=torch.float64) - at[:, None]).abs()
    return (1 - distance).clamp_min(0).float()


def through_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """[S, S, 3], written as a JPEG and read again, bit for bit as TensorFlow does by default.

    Non-obvious: TensorFlow reads JPEGs by libjpeg's fast inverse DCT, PIL by the accurate one: one level apart in the
    mean. Both write alike.

    Raises:
        Unavailable: a JPEG library is not installed.
    """
    try:
        from PIL import Image
        from simplejpeg import decode_jpeg
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "simplejpeg", "openvla") from None
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    decoded: NDArray[np.uint8] = decode_jpeg(buffer.getvalue(), fastdct=True)
    return decoded
