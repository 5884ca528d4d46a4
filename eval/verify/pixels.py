"""Is the preprocessing right? Its pixels beside those that PIL makes of the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneConfig, ControlConfig
from rsd_trt.eval.verify.backbone_result import BackboneParity, worst
from rsd_trt.eval.verify.components import NotMeasured
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor

LEVELS = 255  # of an 8-bit channel
LEVEL_LIMIT = 1.001  # PIL rounds its filter to 8 bits: a pixel may come out one level apart


def preprocessing(
    bundle: Bundle, device: torch.device, observations: Sequence[Observation]
) -> Iterator[BackboneParity | NotMeasured]:
    """The pixels beside PIL's, in float32."""
    control, shape = bundle.config.control, replace(bundle.config.backbone, dtype="float32")
    preprocess = Preprocessor(control, shape, bundle.tokenizer(), device)
    std = torch.tensor([tower.std for tower in shape.towers])[:, :, None, None]
    found, expected = [], []
    try:
        for observation in observations:
            found += [*preprocess.pixels(torch.from_numpy(observation.images[None]).to(device))[0].cpu()]
            expected += [pil_pixels(image, control, shape) for image in observation.images]
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed. Install it: pip install pillow"
        yield NotMeasured("preprocessing", "eager", "float32", "1", reason)
        return
    pairs = list(zip(found, expected, strict=True))
    levels, _ = worst(((x * std * LEVELS).flatten(1), (y * std * LEVELS).flatten(1)) for x, y in pairs)
    _, cosine = worst((x.flatten(1), y.flatten(1)) for x, y in pairs)
    exceeded = () if levels <= LEVEL_LIMIT else (f"levels {levels:.3g} > {LEVEL_LIMIT:g}",)
    yield BackboneParity(
        "preprocessing", "eager", "float32", "1", "PIL", len(observations), levels, cosine, exceeded=exceeded
    )


def pil_pixels(image: NDArray[np.uint8], control: ControlConfig, backbone: BackboneConfig) -> Tensor:
    """One camera's image [S, S, 3] uint8 -> pixels [towers, 3, size, size], as OpenVLA's processors make them."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture = picture.rotate(180) if control.rotate_images else picture
    keep = round(picture.width * control.center_crop**0.5)
    left = (picture.width - keep) // 2
    size = backbone.image_size
    picture = picture.crop((left, left, left + keep, left + keep)).resize((size, size), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / LEVELS  # [3, size, size]
    mean, std = (
        torch.tensor([getattr(t, name) for t in backbone.towers])[:, :, None, None] for name in ("mean", "std")
    )
    return (x - mean) / std
