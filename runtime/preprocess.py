"""From observations to the backbone's inputs: exactly what the bundle's `control` says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from rsd_trt.config import MAX_PIXELS, STOP_TOKEN, BackboneConfig, ControlConfig, torch_dtype
from rsd_trt.errors import UserError
from rsd_trt.models.backbone import PLACEHOLDER, BackboneInputs
from rsd_trt.prompts import encode
from rsd_trt.runtime.observation import Observation, described
from rsd_trt.runtime.pixels import LEVELS, resampling, resize, through_jpeg

INSTRUCTIONS = 256  # that are remembered


class Preprocessor:
    """Observations -> backbone inputs."""

    def __init__(
        self,
        control: ControlConfig,
        backbone: BackboneConfig,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype | None = None,
        state: bool = False,
    ) -> None:
        """dtype: of the pixels; by default the configuration's. state: whether the draft reads the robot's state."""
        self.reads_state = backbone.proprio or state
        self.control = control
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype or torch_dtype(backbone.precision)
        self._mean = self._channels([tower.mean for tower in backbone.towers])
        self._std = self._channels([tower.std for tower in backbone.towers])
        self._resample = resampling(control, backbone.image_size).to(device)
        self._prompts: dict[str, list[int]] = {}

    def __call__(self, observations: Sequence[Observation]) -> BackboneInputs:
        """A batch of observations -> inputs on the device.

        Raises:
            UserError: images, proprio or an instruction that are not what the configuration states.
        """
        for observation in observations:
            self.check(observation)
        images = np.stack([self.frames(observation.images) for observation in observations])  # [B, cameras, S, S, 3]
        prompts = [self.tokens(observation.instruction) for observation in observations]
        tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = torch.tensor(prompt)
        return BackboneInputs(
            pixels=self.seen(torch.from_numpy(images).to(self.device)),
            tokens=tokens.to(self.device),
            lengths=torch.tensor([len(prompt) for prompt in prompts], device=self.device),
            proprio=torch.from_numpy(self.states(observations)).to(self.device) if self.backbone.proprio else None,
        )

    def frames(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What is done to images [..., S, S, 3] in the host's memory, before they go to the device: with
        `jpeg_quality`, rotation and the way through a JPEG, which no library decodes on every device.

        Raises:
            Unavailable: a JPEG library is not installed.
        """
        quality = self.control.jpeg_quality
        if quality is None:
            return images
        rotated = np.ascontiguousarray(images[..., ::-1, ::-1, :] if self.control.rotate_images else images)
        flat = rotated.reshape(-1, *rotated.shape[-3:])
        return np.stack([through_jpeg(image, quality) for image in flat]).reshape(rotated.shape)

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 images [B, cameras, S, S, 3] -> normalised [B, cameras, towers, 3, size, size] on the device."""
        frames = self.frames(images.cpu().numpy()) if self.control.jpeg_quality is not None else None
        return self.seen(images if frames is None else torch.from_numpy(frames).to(self.device))

    def seen(self, frames: Tensor) -> Tensor:
        """What `frames` gives, on the device -> pixels: rotation by 180 degrees where it is still to be done, crop and
        resize, and each tower's mean and standard deviation."""
        if self.control.rotate_images and self.control.jpeg_quality is None:
            frames = frames.flip(2, 3)
        size = self.backbone.image_size
        x = self._resample(frames.flatten(0, 1).permute(0, 3, 1, 2))  # [B * cameras, 3, size, size]
        x = x.view(*frames.shape[:2], 1, 3, size, size) / LEVELS
        return ((x - self._mean) / self._std).to(self.dtype)

    def compile(self) -> None:
        """Has torch.compile fuse what lies around the resize."""
        self.seen = torch.compile(self.seen, dynamic=False)  # type: ignore[method-assign]

    def tokens(self, instruction: str) -> list[int]:
        """What the backbone reads: the prompt, and with action tokens their placeholders and the stop token.

        Raises:
            UserError: as `prompt_tokens`.
        """
        prompt, count = self.prompt_tokens(instruction), self.backbone.action_tokens
        return [*prompt, *[PLACEHOLDER] * count, STOP_TOKEN] if count else prompt

    def prompt_tokens(self, instruction: str) -> list[int]:
        """The prompt's token ids, BOS first.

        Raises:
            UserError: the tokenizer cannot encode it, or gives an id that the backbone does not know.
        """
        if instruction not in self._prompts:
            text = instruction.lower() if self.control.lowercase else instruction
            ids = encode(self.tokenizer, self.control.prompt.replace("{instruction}", text))
            suffix = self.control.suffix_token
            if suffix is not None and ids[-1] != suffix:
                ids.append(suffix)
            if not 0 <= min(ids) <= max(ids) < self.backbone.language.vocab:
                raise UserError(
                    f"tokenizer.json or control.suffix_token gives the id {max(ids)}, "
                    f"backbone.language.vocab is {self.backbone.language.vocab}: the bundle does not fit together"
                )
            if len(self._prompts) >= INSTRUCTIONS:
                self._prompts.pop(next(iter(self._prompts)))
            self._prompts[instruction] = ids
        return self._prompts[instruction]

    def states(self, observations: Sequence[Observation]) -> NDArray[np.float32]:
        """The robots' states [B, 8], normalised; `check` has seen that they are there."""
        return self.proprio(np.stack([observation.proprio for observation in observations]))  # type: ignore[misc]

    def proprio(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """[B, 8] -> [B, 8]; with quantiles, 2 (x - q01) / (q99 - q01 + 1e-8) - 1 where the mask is true, and all of it
        clipped to [-1, 1], as OpenVLA-OFT does: in float64."""
        x = values.astype(np.float64)
        if (quantiles := self.control.proprio_quantiles) is not None:
            q01, q99 = np.array(quantiles.q01), np.array(quantiles.q99)
            normalised = 2 * (x - q01) / (q99 - q01 + 1e-8) - 1
            x = np.clip(np.where(quantiles.mask, normalised, x), -1, 1)
        return x.astype(np.float32)

    def check(self, observation: Observation) -> None:
        """Raises UserError unless images, proprio (where backbone or draft read it) and instruction are what the
        configuration states."""
        observation.check(self.control, self.reads_state, ", or have them resized: Policy.load(resize=True)")

    def _channels(self, values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(values, device=self.device).view(1, 1, len(values), 3, 1, 1)


def fit_frames(images: NDArray[np.uint8], control: ControlConfig, mean: Sequence[float]) -> NDArray[np.uint8]:
    """RGB frames uint8 [cameras, H, W, 3] as the bundle takes them, [cameras, S, S, 3], by its `control.resize`:
    `resize-naive` squeezes them, `letterbox` first puts them into the middle of a square of the colour `mean` (of
    pixels in [0, 1]), as OpenVLA's processor does.

    Raises:
        UserError: they are no such frames.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images are {described(images)}, not RGB frames uint8 [cameras, H, W, 3]")
    height, width = images.shape[1:3]
    if not 0 < min(height, width) <= max(height, width) <= MAX_PIXELS:
        raise UserError(f"frames of {height} x {width} pixels cannot be resized: a side has 1..{MAX_PIXELS}")
    if height == width == control.camera_size:
        return images
    if control.resize == "letterbox" and height != width:
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        square = np.empty((len(images), height + 2 * top, width + 2 * left, 3), np.uint8)
        square[:] = [int(255 * channel) for channel in mean]
        square[:, top : top + height, left : left + width] = images
        images = square
    frames = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return resize(frames, control.camera_size).permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()
