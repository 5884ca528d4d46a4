"""The demonstrations on the training device, and the batches that are drawn from them."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from msgspec import structs
from tokenizers import Tokenizer
from torch import Tensor

from examples.reference_policy.collect import CAMERAS, STATE, SUFFIX
from rsd_trt.config import ARM_DIMS, BundleConfig, Quantiles
from rsd_trt.errors import UserError
from rsd_trt.models.backbone import BackboneInputs
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.training.augment import augment, augment_state
from rsd_trt.training.batches import draw_weights

log = logging.getLogger(__name__)

HELD_OUT_EVERY = 20  # episodes: those whose seed it divides are never trained on
NARROWEST = 1e-3  # between two quantiles, so that a dimension that never moves is not blown up


@dataclass(frozen=True)
class Demonstrations:
    """F frames of all episodes, on one device."""

    images: Tensor  # [F, cameras, size, size, 3] uint8, as the backbone sees them
    proprio: Tensor  # [F, 8] float32, not normalised
    scene: Tensor  # [F, 6] float32, m
    row: Tensor  # [F] int64, the frame's action in `actions`
    end: Tensor  # [F] int64, behind the last action of the frame's episode
    task: Tensor  # [F] int64
    held_out: Tensor  # [F] bool
    actions: Tensor  # [S, A] float32, the expert's
    instructions: tuple[str, ...]  # by task

    def chunks(self, index: Tensor, steps: int) -> Tensor:
        """The expert's next actions [B, steps, A] from frames `index` [B]; behind the end the last one repeats."""
        rows = self.row[index, None] + torch.arange(steps, device=index.device)
        return self.actions[torch.minimum(rows, self.end[index, None] - 1)]


def load_demonstrations(folder: Path, device: torch.device) -> Demonstrations:
    """Reads every episode below `folder` onto the device.

    Raises:
        UserError: there is none that ended well.
    """
    found: dict[str, list[Tensor]] = {}
    instructions: dict[int, str] = {}
    offset = 0
    for file in sorted(folder.rglob(f"*{SUFFIX}")):
        with h5py.File(file, "r") as opened:
            data = opened["data"]
            summary = json.loads(data.attrs["summary"])
            if not summary["frames"]:
                continue
            seen, actions = data["demo_0/obs"], data["demo_0/expert"][:]
            row = torch.from_numpy(seen["step"][:]).long() + offset
            offset += len(actions)
            arrays = {
                "images": torch.from_numpy(np.stack([seen[camera][:] for camera in CAMERAS], axis=1)),
                "proprio": torch.from_numpy(np.concatenate([seen[name][:] for name in STATE], axis=1)),
                "scene": torch.from_numpy(seen["scene"][:]),
                "row": row,
                "end": torch.full_like(row, offset),
                "task": torch.full_like(row, summary["task"]),
                "held_out": torch.full_like(row, summary["seed"] % HELD_OUT_EVERY == 0).bool(),
                "actions": torch.from_numpy(actions),
            }
            for name, tensor in arrays.items():
                found.setdefault(name, []).append(tensor.to(device))
            instructions[summary["task"]] = json.loads(data.attrs["problem_info"])["language_instruction"]
    if not found:
        raise UserError(f"{folder} has no demonstrations. Collect some: python -m examples.reference_policy.collect")
    log.info("%d episodes, %d tasks", len(found["row"]), len(instructions))
    return Demonstrations(
        **{name: torch.cat(tensors) for name, tensors in found.items()},
        instructions=tuple(instructions.get(task, "") for task in range(max(instructions) + 1)),
    )


def quantiles(numbers: Tensor) -> Quantiles:
    """1% and 99% of each column of [n, columns]."""
    values = numbers.double().cpu().numpy()
    low, high = np.quantile(values, 0.01, axis=0), np.quantile(values, 0.99, axis=0)
    high = np.maximum(high, low + NARROWEST)
    return Quantiles(tuple(low.round(6).tolist()), tuple(high.round(6).tolist()), (True,) * len(low))


class Batches:
    """Frames -> what the backbone reads and what it should say, under the bundle's own preprocessing."""

    def __init__(self, data: Demonstrations, config: BundleConfig, tokenizer: Tokenizer, seed: int) -> None:
        device = data.images.device
        self.data, self.steps = data, config.dims.T
        # The images are rotated and resized already.
        control = structs.replace(config.control, rotate_images=False, camera_size=config.backbone.image_size)
        self.preprocess = Preprocessor(control, config.backbone, tokenizer, device)
        proprio = self.preprocess.proprio(data.proprio.cpu().numpy())
        self.proprio = torch.from_numpy(proprio).to(device)  # [F, 8]
        prompts = [self.preprocess.prompt_tokens(instruction) for instruction in data.instructions]
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64, device=device)
        for task, prompt in enumerate(prompts):
            self.tokens[task, : len(prompt)] = torch.tensor(prompt, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.held_out = data.held_out.nonzero()[:, 0]
        self._train = (~data.held_out).nonzero()[:, 0]
        gripper = data.chunks(self._train, self.steps)[..., ARM_DIMS]
        weights = draw_weights(data.task[self._train].cpu().numpy(), gripper.cpu().numpy())
        self._weights = torch.from_numpy(weights).to(device)

    def draw(self, count: int) -> Tensor:
        """Random training frames [count], with `draw_weights`."""
        chosen = torch.multinomial(self._weights, count, replacement=True, generator=self.generator)
        return self._train[chosen]

    def inputs(self, index: Tensor, augmented: bool) -> BackboneInputs:
        """What the backbone reads for frames `index` [B]."""
        images, proprio, task = self.data.images[index], self.proprio[index], self.data.task[index]
        if augmented:
            images = augment(images, self.generator)
            proprio = augment_state(proprio, self.generator)
        return BackboneInputs(self.preprocess.pixels(images), self.tokens[task], self.lengths[task], proprio)

    def actions(self, index: Tensor) -> Tensor:
        """The expert's chunks [B, T, A] for frames `index` [B]."""
        return self.data.chunks(index, self.steps)
