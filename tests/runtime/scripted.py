"""Test doubles for the policy: a backbone that notes its blocks, and heads that say what a script tells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from msgspec import structs
from torch import Tensor

from rsd_trt.config import ARM_DIMS, BundleConfig, Dims, Mode, RsdConfig
from rsd_trt.models.backbone import BackboneState
from rsd_trt.models.components import agreeing_steps, all_finite
from rsd_trt.presets import preset
from rsd_trt.runtime.forward import EagerForward
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.speculate import RandomAcceptance, Rule

DIMS = Dims(T=6, D=4, L=3, C=2, K=3)
N = preset("tiny", "tiny").backbone.language.blocks
DRAFT_BLOCK = 1
NAN = float("nan")
Step = tuple[int, int]  # of the arm and of the gripper (-1 or 1)


@dataclass(frozen=True)
class Frame:
    """What draft and main head say to one observation, and where a NaN comes up."""

    draft: Sequence[Step]
    main: Sequence[Step]
    draft_token: int = 0
    main_token: int = 0
    nan: Literal["", "hidden k", "hidden N", "draft", "head"] = ""


def chunk(steps: Sequence[Step]) -> Tensor:
    """[T, A]: all arm dimensions alike."""
    return torch.tensor([[float(arm)] * ARM_DIMS + [float(gripper)] for arm, gripper in steps])


class World:
    """Frames, seen by their numbers."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames = list(frames)
        self.device = torch.device("cpu")
        self.ran: list[tuple[int, int]] = []  # (frame, block) of every block that ran
        self.conditions: list[Tensor] = []

    def __call__(self, observations: Sequence[int]) -> Tensor:
        return torch.tensor(observations)

    def run(self, inputs: Tensor, until: int) -> BackboneState:
        return self.resume(BackboneState(inputs.view(-1, 1, 1).float(), torch.zeros_like(inputs), 0), until)

    def resume(self, state: BackboneState, until: int) -> BackboneState:
        assert state.block <= until
        for block in range(state.block + 1, until + 1):
            self.ran += [(int(frame), block) for frame in state.stream]
        return dataclasses.replace(state, block=until)

    def hidden(self, state: BackboneState) -> Tensor:
        bad = ("hidden k", "hidden N") if state.block == N else ("hidden k",)
        rows = [[int(frame), NAN if self.frames[int(frame)].nan in bad else 0.0] for frame in state.stream]
        return torch.tensor(rows)  # [B, 2]: the frame, and what may be NaN


@dataclass
class Draft:
    """The session `propose`."""

    sha256 = None

    world: World

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        frames = [self.world.frames[int(row[0])] for row in inputs["hidden"]]
        logits = torch.tensor([[NAN if frame.nan == "draft" else 0.0] for frame in frames])
        return {
            "tokens": torch.stack([torch.full((DIMS.T, DIMS.D, DIMS.C), frame.draft_token) for frame in frames]),
            "actions": torch.stack([chunk(frame.draft) for frame in frames]),
            "finite": all_finite(logits, inputs["hidden"]),
        }


@dataclass
class Main:
    """The session `predict`. Its buffers are its own: each run overwrites them."""

    sha256 = None

    world: World
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        for buffer in self.buffers.values():
            buffer.zero_()
        if "condition" in inputs:
            self.world.conditions.append(inputs["condition"])
        frames = [self.world.frames[int(row[0])] for row in inputs["hidden"]]
        actions = torch.stack([chunk(frame.main) for frame in frames])
        logits = torch.tensor([[NAN if frame.nan == "head" else 0.0] for frame in frames])
        self.buffers = {
            "tokens": torch.stack([torch.full((DIMS.T, DIMS.D, DIMS.L), frame.main_token) for frame in frames]),
            "actions": actions,
            "agreement": agreeing_steps(inputs["coarse_actions"], actions, inputs["tolerance"]),
            "finite": all_finite(logits, inputs["hidden"]),
        }
        return self.buffers


def configure(kind: str = "rfsq", draft_block: int = DRAFT_BLOCK, **rsd: object) -> BundleConfig:
    config = preset("tiny", "tiny")
    values: dict[str, object] = {"n_action_steps": 2, "refresh": 100, "tolerance": (0.5,) * ARM_DIMS, **rsd}
    return structs.replace(
        config,
        dims=DIMS,
        rsd=RsdConfig(draft_block=draft_block, **values),  # type: ignore[arg-type]
        head=structs.replace(config.head, kind=kind),
    )


def scripted(
    frames: Sequence[Frame],
    mode: Mode = "rsd",
    environments: int = 1,
    decided_by: Rule | None = None,
    **settings: object,
) -> tuple[Policy, World]:
    """A policy over frames; its observations are their numbers. Mode `random` accepts every other time by default."""
    world = World(frames)
    config = configure(**settings)  # type: ignore[arg-type]
    forward = EagerForward(config, world, Draft(world), Main(world), world)  # type: ignore[arg-type]
    rule = RandomAcceptance(0.5, 0) if decided_by is None and mode == "random" else decided_by
    return Policy(config, forward, mode, None, environments, rule), world
