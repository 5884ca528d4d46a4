"""A test double for the policy: a forward whose draft and main head say what a script tells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS, BundleConfig, Dims, HiddenDraftConfig, Limits, Mode, RsdConfig
from rsd_trt.presets import preset
from rsd_trt.runtime.loop import Guess, Main
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.speculate import Actions, RandomAcceptance, Rule, Tokens

DIMS = Dims(T=6, D=4, L=3, C=2, K=3)
NAN = float("nan")
Step = tuple[int, int]  # of the arm and of the gripper (-1 or 1)


@dataclass(frozen=True)
class Frame:
    """An observation: what draft and main head say to it, and where a NaN comes up."""

    draft: Sequence[Step]
    main: Sequence[Step]
    draft_token: int = 0
    main_token: int = 0
    nan: Literal["", "hidden", "draft", "head"] = ""
    instruction: str = "do it"


def chunk(steps: Sequence[Step]) -> Actions:
    """[T, A]: all arm dimensions alike."""
    return np.array([[float(arm)] * ARM_DIMS + [float(gripper)] for arm, gripper in steps], np.float32)


class World:
    """A `rsd_trt.runtime.forward.Forward`. Its buffers are its own: each query overwrites them."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sessions: dict[str, object] = {"propose": Session(), "predict": Session()}
        self.ran: list[tuple[str, Frame]] = []  # ("check" or "full", frame) of everything that was computed
        self.conditions: list[Tokens] = []
        self._lent: list[NDArray[np.generic]] = []

    def begin(self, observations: Sequence[Frame]) -> None:
        pass

    def check(self, observations: Sequence[Frame]) -> Guess:
        self.ran += [("check", frame) for frame in observations]
        tokens = self._filled([frame.draft_token for frame in observations], DIMS.C)
        logits = np.zeros((len(observations), DIMS.T, DIMS.D, DIMS.K), np.float32)
        for row, frame in zip(logits, observations, strict=True):
            row[..., frame.draft_token] = 10
        finite = np.array([frame.nan != "draft" for frame in observations])
        return Guess(tokens, np.stack([chunk(frame.draft) for frame in observations]), logits, finite)

    def full(self, observations: Sequence[Frame], condition: Tokens | None = None) -> Main:
        for lent in self._lent:
            lent[...] = 0
        self.ran += [("full", frame) for frame in observations]
        self.conditions += [] if condition is None else [condition.copy()]
        self.hidden = torch.tensor([[NAN if frame.nan == "hidden" else 0.0] for frame in observations])
        finite = np.array([frame.nan not in ("hidden", "head") for frame in observations])
        tokens = self._filled([frame.main_token for frame in observations], DIMS.L)
        actions = np.stack([chunk(frame.main) for frame in observations])
        self._lent = [tokens, actions]
        return Main(tokens, actions, finite)

    def _filled(self, tokens: Sequence[int], layers: int) -> Tokens:
        return np.stack([np.full((DIMS.T, DIMS.D, layers), token, np.int64) for token in tokens])


class Session:
    sha256 = None


def configure(hidden: bool = False, limits: Limits | None = None, **rsd: object) -> BundleConfig:
    config = preset("tiny", "tiny")
    values: dict[str, object] = {"n_action_steps": 2, "rule": "actions", "tolerance": (0.5,) * ARM_DIMS, **rsd}
    return structs.replace(
        config,
        dims=DIMS,
        draft=HiddenDraftConfig() if hidden else config.draft,
        rsd=RsdConfig(**values),  # type: ignore[arg-type]
        control=structs.replace(config.control, limits=limits or Limits()),
    )


def scripted(
    mode: Mode = "rsd",
    environments: int = 1,
    decided_by: Rule | None = None,
    **settings: object,
) -> tuple[Policy, World]:
    """A policy whose observations are frames. Mode `random` accepts every other time by default."""
    world = World()
    rule = RandomAcceptance(0.5, 0) if decided_by is None and mode == "random" else decided_by
    config = configure(**settings)  # type: ignore[arg-type]
    return Policy(config, world, mode, None, environments, rule), world  # type: ignore[arg-type]
