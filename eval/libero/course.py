"""What a perturbation is: drawn from (seed, task, trial) alone, and the same for every policy and mode.

A `Perturbation` is drawn before the episode and travels to the simulator's process. There, once the scene is reset, it
begins a `Course`, which is told of every control step before it is made and may change the scene. The next
observation shows what it did, and its `event` is kept with the episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from robosuite.utils.binding_utils import MjSim

Offset = tuple[float, float]  # m, along x and y of the world
Cameras = Literal["asked", "on", "frozen"]  # whether a control step renders: where it is asked to, always, never
Happening = Literal["displace", "late", "moving", "distractor", "light", "frozen"]


@dataclass(frozen=True)
class Event:
    """What happened in an episode."""

    kind: Happening
    step: int  # whose action is the first to meet it
    displacement: Offset | None = None  # of the object that was moved, in all


class Scene(Protocol):
    """What a perturbation may change: `rsd_trt.eval.libero.simulator.Simulator`, which puts it back at a reset."""

    cameras: Cameras

    @property
    def physics(self) -> MjSim: ...
    def light(self, factor: float) -> None: ...


class Course(Protocol):
    """A perturbation in one episode."""

    @property
    def event(self) -> Event | None:
        """What has happened so far."""
        ...

    def before_step(self, step: int, action: NDArray[np.float32]) -> None:
        """Control step `step` is about to execute `action` [A]. Steps come one by one, from 0."""
        ...


class Perturbation(Protocol):
    """What is to happen in an episode. Picklable, and equal to another one of the same seed, task and trial."""

    def begin(self, scene: Scene) -> Course:
        """Its course in a scene that has just been reset."""
        ...
