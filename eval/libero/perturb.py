"""The perturbation of an episode: the target is displaced on its support, once, before any hand has reached it.

When and by how much is drawn from (seed, task, trial) alone, so that it is the same for every policy and mode. It
happens between two control steps: the next observation shows it. Candidates are tried in the order in which they were
drawn, and whether there is room for one depends on the scene, not on who acts. It does not happen at all where
the hand is at the target by then, or where no candidate has room.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rsd_trt.errors import UserError

if TYPE_CHECKING:
    from mujoco import MjData, MjModel
    from robosuite.utils.binding_utils import MjSim

Offset = tuple[float, float]  # m, along x and y of the world

SUITE = "libero_spatial"  # the one whose target is known
TARGET = "akita_black_bowl_1"
HAND = "gripper0_grip_site"
ROBOT = ("robot0", "gripper0", "mount0")  # what the names of its bodies start with

STEPS = (5, 15)  # the displacement comes before one of these steps; at full speed the first touch is later
DISPLACEMENT = (0.02, 0.05)  # m
CLEARANCE = 0.07  # m between grip site and target, at least
TRIES = 8
PENETRATION = 0.002  # m that the target may be deeper in its support than before
REST = 0.4  # s that the displaced target is watched
STIRRED, TURNED = 0.004, 0.1  # m and rad that it may move meanwhile


@dataclass(frozen=True)
class Perturbation:
    """What is to happen to the target in an episode."""

    step: int  # whose action is the first to meet the displaced target
    offsets: tuple[Offset, ...]  # the first one that there is room for is taken


def draw(seed: int, task: int, trial: int) -> Perturbation:
    """The perturbation of an episode."""
    random = np.random.default_rng([seed, task, trial])
    return Perturbation(int(random.integers(*STEPS)), tuple(offsets(random)))


def offsets(random: np.random.Generator) -> Iterator[Offset]:
    """`TRIES` displacements of `DISPLACEMENT` in any direction, drawn one by one as they are asked for."""
    for _ in range(TRIES):
        angle, distance = random.uniform(0.0, 2 * np.pi), random.uniform(*DISPLACEMENT)
        yield float(distance * np.cos(angle)), float(distance * np.sin(angle))


def check_target(suite: str) -> None:
    """Raises UserError unless the suite's target is known."""
    if suite != SUITE:
        raise UserError(f"--perturb displaces the bowl of {SUITE}; it has no target for {suite}")


def displace(physics: MjSim, candidates: Iterable[Offset]) -> Offset | None:
    """Displaces the target by the first candidate with which it comes to rest there, on what it stood on.

    None if no candidate is like that, or the robot is at the target: then it is where it was. Candidates are tried on
    a copy of the simulation's data, in which everything but the target holds still.
    """
    import mujoco

    model, data = physics.model._model, physics.data._data
    target = physics.model.body_name2id(f"{TARGET}_main")
    if np.linalg.norm(data.xpos[target] - physics.data.get_site_xpos(HAND)) < CLEARANCE:
        return None
    supports, depth = _touching(model, data, target)
    if any(physics.model.body_id2name(body).startswith(ROBOT) for body in supports):
        return None
    joint = f"{TARGET}_joint0"
    start, stop = physics.model.get_joint_qpos_addr(joint)
    before = data.qpos[start:stop].copy()
    for dx, dy in candidates:
        trial = copy.copy(data)
        trial.qpos[start : start + 2] += dx, dy
        mujoco.mj_forward(model, trial)
        bodies, deepest = _touching(model, trial, target)
        if bodies and bodies <= supports and deepest <= depth + PENETRATION and _rests(model, trial, target):
            before[:2] += dx, dy
            physics.data.set_joint_qpos(joint, before)
            physics.forward()
            return dx, dy
    return None


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


def _rests(model: MjModel, data: MjData, target: int) -> bool:
    """Whether the target stays in its place for `REST` while all else holds still; `data` is changed."""
    import mujoco

    joint = model.body_jntadr[target]
    place, motion = model.jnt_qposadr[joint], model.jnt_dofadr[joint]
    qpos, own = data.qpos.copy(), slice(place, place + 7)  # of a free joint: position 3, quaternion 4
    for _ in range(round(REST / model.opt.timestep)):
        mujoco.mj_step(model, data)
        moved = data.qpos[own].copy()
        velocity = data.qvel[motion : motion + 6].copy()
        data.qpos[:], data.qvel[:] = qpos, 0.0
        data.qpos[own], data.qvel[motion : motion + 6] = moved, velocity
    stirred = float(np.linalg.norm(moved[:3] - qpos[own][:3]))
    turned = 2 * np.arccos(min(abs(float(moved[3:] @ qpos[own][3:])), 1.0))
    return bool(stirred < STIRRED and turned < TURNED)
