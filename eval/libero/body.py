"""A free object of a scene: what it touches, where there is room for it, and how it is put elsewhere.

Room is looked for on a copy of the simulation's data, in which everything but the object holds still.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd_trt.eval.libero.course import Offset

if TYPE_CHECKING:
    from mujoco import MjContact, MjData
    from robosuite.utils.binding_utils import MjSim

ROBOT = ("robot0", "gripper0", "mount0")  # what the names of its bodies start with
PENETRATION = 0.002  # m that an object may be deeper in its support than before
SPACING = 0.004  # m between the points of a path that are looked at
UPRIGHT = 0.7  # vertical share of a normal from which on a contact bears, rather than blocks
REST = 0.4  # s that a displaced object is watched
STIRRED, TURNED = 0.004, 0.1  # m and rad that it may move meanwhile


class Body:
    """A free object. Offsets are measured from where it stands when this is made, its home."""

    def __init__(self, physics: MjSim, name: str) -> None:
        self._physics = physics
        self._model, self._data = physics.model._model, physics.data._data
        self._joint = f"{name}_joint0"
        self.id: int = physics.model.body_name2id(f"{name}_main")
        self._place = slice(*physics.model.get_joint_qpos_addr(self._joint))  # position 3, quaternion 4
        self._motion = slice(*physics.model.get_joint_qvel_addr(self._joint))  # linear 3, angular 3
        self.home: NDArray[np.float64] = self._data.qpos[self._place].copy()  # [7]
        self.supports, self._depth = self._touching(self._data)

    @property
    def position(self) -> NDArray[np.float64]:
        """[3], m, of its origin."""
        return np.array(self._data.qpos[self._place][:3])

    @property
    def held(self) -> bool:
        """Whether the robot was at it at home."""
        return any(self._physics.model.body_id2name(body).startswith(ROBOT) for body in self.supports)

    @property
    def touched(self) -> bool:
        """Whether anything touches it but what it stood on at home."""
        return not self._touching(self._data)[0] <= self.supports

    def fits(self, offset: Offset) -> bool:
        """Whether it can be put there: it touches its supports, nothing else, and is no deeper in them than at home."""
        trial = copy.copy(self._data)
        self._move(trial, offset)
        return self._stands(trial)

    def reach(self, places: Sequence[Offset], start: Offset = (0.0, 0.0)) -> int:
        """How many of the places it can slide to one after the other, from `start`: it fits everywhere on the way,
        borne from below and touched nowhere from the side (a drawer's walls are of the same body as its floor)."""
        trial = copy.copy(self._data)
        for count, place in enumerate(places):
            pieces = max(math.ceil(math.dist(start, place) / SPACING), 1)
            for share in np.arange(1, pieces + 1) / pieces:
                self._move(trial, (start[0] + share * (place[0] - start[0]), start[1] + share * (place[1] - start[1])))
                if not self._stands(trial) or self._leans(trial):
                    return count
            start = place
        return len(places)

    def rests(self, offset: Offset) -> bool:
        """Whether it would stay where it was put, upright, for `REST`."""
        import mujoco

        trial = copy.copy(self._data)
        self._move(trial, offset)
        qpos = trial.qpos.copy()
        for _ in range(round(REST / self._model.opt.timestep)):
            mujoco.mj_step(self._model, trial)
            moved, velocity = trial.qpos[self._place].copy(), trial.qvel[self._motion].copy()
            trial.qpos[:], trial.qvel[:] = qpos, 0.0
            trial.qpos[self._place], trial.qvel[self._motion] = moved, velocity
        before = qpos[self._place]
        stirred = float(np.linalg.norm(moved[:3] - before[:3]))
        turned = 2 * np.arccos(min(abs(float(moved[3:] @ before[3:])), 1.0))
        return bool(stirred < STIRRED and turned < TURNED)

    def put(self, offset: Offset, velocity: Offset | None = None) -> None:
        """Puts it there, at home's height and rotation; None leaves its velocity (m/s) as it is."""
        self._physics.data.set_joint_qpos(self._joint, self._at(offset))
        if velocity is not None:
            self._data.qvel[self._motion] = (*velocity, 0.0, 0.0, 0.0, 0.0)
        self._physics.forward()

    def _at(self, offset: Offset) -> NDArray[np.float64]:
        place = self.home.copy()
        place[:2] += offset
        return place

    def _move(self, trial: MjData, offset: Offset) -> None:
        import mujoco

        trial.qpos[self._place] = self._at(offset)
        mujoco.mj_forward(self._model, trial)

    def _stands(self, data: MjData) -> bool:
        bodies, deepest = self._touching(data)
        return bool(bodies) and bodies <= self.supports and deepest <= self._depth + PENETRATION

    def _leans(self, data: MjData) -> bool:
        """Whether any of its contacts is more of a wall than of a floor."""
        return any(abs(contact.frame[2]) < UPRIGHT for contact in self._contacts(data))  # its normal is frame[:3]

    def _touching(self, data: MjData) -> tuple[set[int], float]:
        """The bodies that touch it, and how deep (m) it is in the one that it is deepest in."""
        found: set[int] = set()
        deepest = 0.0
        for contact in self._contacts(data):
            found |= self._bodies(contact) - {self.id}
            deepest = max(deepest, -float(contact.dist))
        return found, deepest

    def _contacts(self, data: MjData) -> list[MjContact]:
        return [contact for contact in data.contact if self.id in self._bodies(contact)]

    def _bodies(self, contact: MjContact) -> set[int]:
        return {int(self._model.geom_bodyid[geom]) for geom in (contact.geom1, contact.geom2)}
