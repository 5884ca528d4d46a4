"""Targets that slide while the expert acts: late, when the hand is near, or for as long as nothing touches them.

Training data only: where there is no room the target stays where it is, and an episode that the expert can't finish
is no example. The perturbations of the evaluation are `rsd_trt.eval.libero`'s.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mujoco import MjData, MjModel
    from robosuite.utils.binding_utils import MjSim

HAND = "gripper0_grip_site"
ROBOT = ("robot0", "gripper0", "mount0")  # what the names of its bodies start with
STEP_SECONDS = 0.05  # of a control step

NONE, LATE, MOVING = 0.6, 0.2, 0.2  # shares of the episodes
NEAR = (0.08, 0.16)  # m between grip site and target below which a late slide begins
LATE_LENGTH, LATE_STEPS = (0.02, 0.08), (5, 11)
MOVING_BEGIN, MOVING_STEPS = (0, 30), (20, 80)
MOVING_SPEED = (0.001, 0.005)  # m a step: 2 to 10 cm/s
DIRECTIONS = 6  # that are tried
SHORTEST = 0.015  # m of free way that is worth it
PROBE = 0.005  # m between two tested points of a way
PENETRATION = 0.002  # m that the target may be deeper in its support than before


@dataclass(frozen=True)
class Slide:
    """What is to happen to the target."""

    begin: int  # the first step at which it may
    near: float  # m between grip site and target below which it does
    steps: int
    speed: float  # m a step
    angles: tuple[float, ...]  # of the directions, in the order in which they are tried


def draw_slide(random: np.random.Generator) -> Slide | None:
    """The slide of an episode."""
    kind = random.choice(3, p=(NONE, LATE, MOVING))
    angles = tuple(random.uniform(0.0, 2 * np.pi, DIRECTIONS).tolist())
    near, late_steps = float(random.uniform(*NEAR)), int(random.integers(*LATE_STEPS))
    late = Slide(0, near, late_steps, float(random.uniform(*LATE_LENGTH)) / late_steps, angles)
    begin, steps = int(random.integers(*MOVING_BEGIN)), int(random.integers(*MOVING_STEPS))
    moving = Slide(begin, np.inf, steps, float(random.uniform(*MOVING_SPEED)), angles)
    return (None, late, moving)[kind]


class Sliding:
    """A slide under way. `advance` is called before each step's action."""

    def __init__(self, slide: Slide, target: str) -> None:
        """target: robosuite's name of the object that slides."""
        self.slide = slide
        self._body, self._joint = f"{target}_main", f"{target}_joint0"
        self.moved = False
        self._velocity: tuple[float, float] | None = None  # m a step
        self._left = slide.steps

    def advance(self, physics: MjSim, step: int) -> None:
        """Moves the target by one step, if its time has come and nothing touches it."""
        if self._left <= 0 or step < self.slide.begin:
            return
        model, data = physics.model._model, physics.data._data
        target = physics.model.body_name2id(self._body)
        if np.linalg.norm(data.xpos[target] - physics.data.get_site_xpos(HAND)) > self.slide.near:
            return
        supports, depth = _touching(model, data, target)
        if not supports or any(physics.model.body_id2name(body).startswith(ROBOT) for body in supports):
            self._left = 0
        elif self._velocity is None:
            self._choose(model, data, target, supports, depth, physics)
        if self._left <= 0 or self._velocity is None:
            return
        place = physics.data.get_joint_qpos(self._joint).copy()
        place[:2] += self._velocity
        self._left -= 1
        motion = np.zeros(6)
        if self._left:
            motion[:2] = np.array(self._velocity) / STEP_SECONDS
        physics.data.set_joint_qpos(self._joint, place)
        physics.data.set_joint_qvel(self._joint, motion)
        physics.forward()
        self.moved = True

    def _choose(
        self, model: MjModel, data: MjData, target: int, supports: set[int], depth: float, physics: MjSim
    ) -> None:
        """Takes the first direction with a free way for the whole slide, else the longest way."""
        start, _ = physics.model.get_joint_qpos_addr(self._joint)
        wanted, best, angle = self.slide.steps * self.slide.speed, 0.0, 0.0
        for candidate in self.slide.angles:
            free = _free_way(model, data, target, start, candidate, wanted, supports, depth + PENETRATION)
            if free > best:
                best, angle = free, candidate
            if free >= wanted:
                break
        if best < min(SHORTEST, wanted):
            self._left = 0
            return
        self._velocity = (float(self.slide.speed * np.cos(angle)), float(self.slide.speed * np.sin(angle)))
        self._left = min(self._left, int(best / self.slide.speed))


def _free_way(
    model: MjModel, data: MjData, target: int, start: int, angle: float, length: float, supports: set[int], depth: float
) -> float:
    """How far (m, up to `length`) the target can go on what it stands on without touching anything else."""
    import mujoco

    trial = copy.copy(data)
    origin, way = data.qpos[start : start + 2].copy(), np.array([np.cos(angle), np.sin(angle)])
    points = np.append(np.arange(PROBE, length, PROBE), length)
    for i, distance in enumerate(points):
        trial.qpos[start : start + 2] = origin + distance * way
        mujoco.mj_forward(model, trial)
        bodies, deepest = _touching(model, trial, target)
        if not bodies or not bodies <= supports or deepest > depth:
            return float(points[i - 1]) if i else 0.0
    return length


def _touching(model: MjModel, data: MjData, target: int) -> tuple[set[int], float]:
    """The bodies that touch the target, and how deep (m) it is in the one that it is deepest in."""
    found: set[int] = set()
    deepest = 0.0
    for contact in data.contact:
        bodies = {int(model.geom_bodyid[contact.geom1]), int(model.geom_bodyid[contact.geom2])}
        if target in bodies:
            found |= bodies - {target}
            deepest = max(deepest, -float(contact.dist))
    return found, deepest
