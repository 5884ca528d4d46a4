"""What a query is given when its time is measured: random images, and a prompt of a given length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.bundle import Bundle
from rsd_trt.config import ControlConfig
from rsd_trt.errors import UserError
from rsd_trt.eval.verify.inputs import random_observations
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor

TYPICAL = "pick up the black bowl between the plate and the ramekin and place it on the plate"
WORDS = " ".join([TYPICAL] * 40)
OBSERVATIONS = 16  # different images, so that no query finds the last one's


@dataclass(frozen=True)
class InputSize:
    """How much is observed. None: as the bundle says, and for the prompt a typical instruction."""

    images: int | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class QueryInputs:
    """A bundle for one input size, with observations of it."""

    bundle: Bundle
    images: int
    prompt_tokens: int
    observations: tuple[Observation, ...]


def make_inputs(bundle: Bundle, size: InputSize) -> QueryInputs:
    """The bundle with as many cameras, and observations of random smooth images with a prompt of as many tokens.

    Raises:
        UserError: no text gives such a prompt.
    """
    control, instruction = bundle.config.control, TYPICAL
    if size.images is not None:
        control = structs.replace(control, cameras=tuple(f"camera {i}" for i in range(size.images)))
    if size.prompt_tokens is not None:
        control = structs.replace(control, prompt="{instruction}", lowercase=False)
        instruction = _text_of(bundle, control, size.prompt_tokens)
    config = structs.replace(bundle.config, control=control)
    observations = tuple(
        replace(observation, images=_smooth(observation.images), instruction=instruction)
        for observation in random_observations(control, OBSERVATIONS)
    )
    tokens = len(_preprocessor(bundle, control).prompt_tokens(instruction))
    return QueryInputs(replace(bundle, config=config), len(control.cameras), tokens, observations)


def _smooth(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every 8th pixel of images [cameras, S, S, 3], and between them straight lines: a JPEG step takes two to three
    times as long with noise as with a picture."""
    side = images.shape[1]
    coarse = torch.from_numpy(images[:, ::8, ::8].copy()).permute(0, 3, 1, 2).float()
    found = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return found.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _text_of(bundle: Bundle, control: ControlConfig, tokens: int) -> str:
    """The start of a text that makes a prompt of so many tokens. A letter more adds one at most, as a rule."""
    preprocess = _preprocessor(bundle, control)
    for end in range(1, len(WORDS)):
        count = len(preprocess.prompt_tokens(WORDS[:end]))
        if count == tokens:
            return WORDS[:end]
        if count > 2 * tokens + 8:
            break
    raise UserError(f"no text gives a prompt of {tokens} tokens with the tokenizer of {bundle.path}")


def _preprocessor(bundle: Bundle, control: ControlConfig) -> Preprocessor:
    return Preprocessor(control, bundle.config.backbone, bundle.tokenizer(), torch.device("cpu"))
