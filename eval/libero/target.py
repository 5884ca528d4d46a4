"""Perturbations of the target, the bowl of libero_spatial: displaced early, sliding late, or moving.

Distances to the hand are from the grip site to the nearest point of the *grasp ring*: the circle around the bowl's axis
on which the grip site is when the fingers close on the rim. Where there is room for a path depends on the scene, not
on who acts: it is worked out in the scene as it was reset, and kept for the episodes of the same seed, task and trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS
from rsd_trt.eval.libero.body import Body
from rsd_trt.eval.libero.course import Course, Event, Offset, Scene
from rsd_trt.eval.libero.slide import CONTROL_SECONDS, TRIES, Slide, Still, straight

if TYPE_CHECKING:
    from robosuite.utils.binding_utils import MjSim

SUITE = "libero_spatial"  # the one whose target is known
TARGET = "akita_black_bowl_1"
HAND = "gripper0_grip_site"
GRASP_RADIUS, GRASP_HEIGHT = 0.047, 0.036  # m of the grasp ring, from the bowl's axis and over its foot

STEPS = (5, 15)  # `Displace` comes before one of these steps; at full speed the first touch is later
DISPLACEMENT = (0.02, 0.05)  # m
CLEARANCE = 0.07  # m between grip site and the target's origin, at least
DISPLACE_TRIES = 8

NEAR = (0.06, 0.10)  # m from the grasp ring: where the hand sets `Late` off
SLIDE_STEPS = (5, 11)  # that a late slide takes
FAR = (0.12, 0.20)  # m from the grasp ring: where the hand sets `Moving` off
TRACK = (0.04, 0.10)  # m, the shortest and the longest path of a moving target, which turns back at its ends
SPACING = 0.005  # m: a track is as long as a multiple of it

Path = tuple[float, float]  # angle in rad, length in m
_paths: dict[Late | Moving, Path | None] = {}


@dataclass(frozen=True)
class Displace:
    """The target jumps, once, before any hand has reached it."""

    step: int  # whose action is the first to meet the displaced target
    offsets: tuple[Offset, ...]  # the first one that there is room for is taken

    def begin(self, scene: Scene) -> Course:
        return Jump(self, scene)


class Jump:
    """The course of a `Displace`."""

    def __init__(self, perturbation: Displace, scene: Scene) -> None:
        self._perturbation, self._scene = perturbation, scene
        self.event: Event | None = None

    def before_step(self, step: int, action: NDArray[np.float32]) -> None:
        if step == self._perturbation.step and (moved := displace(self._scene.physics, self._perturbation.offsets)):
            self.event = Event("displace", step, moved)


def displace(physics: MjSim, candidates: Iterable[Offset]) -> Offset | None:
    """Displaces the target by the first candidate with which it comes to rest there, on what it stood on.

    None if no candidate is like that, or the robot is at the target: then it is where it was.
    """
    body = Body(physics, TARGET)
    if body.held or np.linalg.norm(physics.data._data.xpos[body.id] - physics.data.get_site_xpos(HAND)) < CLEARANCE:
        return None
    for offset in candidates:
        if body.fits(offset) and body.rests(offset):
            body.put(offset)
            return offset
    return None


def draw_displace(random: np.random.Generator) -> Displace:
    return Displace(int(random.integers(*STEPS)), tuple(offsets(random)))


def offsets(random: np.random.Generator) -> Iterator[Offset]:
    """`DISPLACE_TRIES` displacements of `DISPLACEMENT` in any direction, drawn one by one as they are asked for."""
    for _ in range(DISPLACE_TRIES):
        angle, distance = random.uniform(0.0, 2 * np.pi), random.uniform(*DISPLACEMENT)
        yield float(distance * np.cos(angle)), float(distance * np.sin(angle))


@dataclass(frozen=True)
class Late:
    """The target slides away when the hand is about to reach it, while nothing touches it."""

    key: tuple[int, int, int]  # seed, task, trial
    near: float  # m from the grasp ring to the grip site
    steps: int
    candidates: tuple[Path, ...]  # the first one that there is room for is taken

    def begin(self, scene: Scene) -> Course:
        body = Body(scene.physics, TARGET)
        if (path := self._path(body)) is None:
            return Still()
        return Slide("late", body, straight(*path, self.steps), partial(_within, scene.physics, self.near))

    def _path(self, body: Body) -> Path | None:
        if self not in _paths:
            _paths[self] = next((path for path in self.candidates if self._has_room(body, path)), None)
        return _paths[self]

    def _has_room(self, body: Body, path: Path) -> bool:
        places = straight(*path, self.steps)
        return body.reach(places) == self.steps and body.rests(places[-1])


def draw_late(key: tuple[int, int, int], random: np.random.Generator, distance: tuple[float, float]) -> Late:
    near, steps = float(random.uniform(*NEAR)), int(random.integers(*SLIDE_STEPS))
    candidates = [(random.uniform(0.0, 2 * np.pi), random.uniform(*distance)) for _ in range(TRIES)]
    return Late(key, near, steps, tuple(candidates))


@dataclass(frozen=True)
class Moving:
    """The target slides to and fro from when the hand comes, until it is touched or the gripper is told to close."""

    key: tuple[int, int, int]  # seed, task, trial
    near: float  # m from the grasp ring to the grip site
    speed: float  # m/s
    angles: tuple[float, ...]  # rad, of the line; the first one that there is room on is taken

    def begin(self, scene: Scene) -> Course:
        body = Body(scene.physics, TARGET)
        if (path := self._path(body)) is None:
            return Still()
        angle, length = path
        steps = max(round(length / (self.speed * CONTROL_SECONDS)), 1)
        there = straight(angle, steps * self.speed * CONTROL_SECONDS, steps)
        # The last place of each way is the first of the way back.
        to_and_fro = chain(there, cycle([*there[-2::-1], (0.0, 0.0), *there]))
        return Slide("moving", body, to_and_fro, partial(_within, scene.physics, self.near), _closes)

    def _path(self, body: Body) -> Path | None:
        if self not in _paths:
            _paths[self] = next(filter(None, (self._track(body, angle) for angle in self.angles)), None)
        return _paths[self]

    def _track(self, body: Body, angle: float) -> Path | None:
        """The longest path in that direction, if it is long enough."""
        most = round(TRACK[1] / SPACING)
        points = straight(angle, TRACK[1], most)
        reached = body.reach(points)
        if reached < most:
            reached -= 1  # not up to the edge
        length = reached * SPACING
        return (angle, length) if length >= TRACK[0] and body.rests(points[reached - 1]) else None


def draw_moving(key: tuple[int, int, int], random: np.random.Generator, speed: tuple[float, float]) -> Moving:
    near, drawn = float(random.uniform(*FAR)), float(random.uniform(*speed))
    return Moving(key, near, drawn, tuple(random.uniform(0.0, 2 * np.pi, TRIES).tolist()))


def grasp_distance(physics: MjSim) -> float:
    """m from the grip site to the nearest point of the target's grasp ring."""
    data, target = physics.data._data, physics.model.body_name2id(f"{TARGET}_main")
    local = data.xmat[target].reshape(3, 3).T @ (physics.data.get_site_xpos(HAND) - data.xpos[target])
    return float(np.hypot(np.hypot(local[0], local[1]) - GRASP_RADIUS, local[2] - GRASP_HEIGHT))


def _within(physics: MjSim, distance: float, step: int) -> bool:
    return grasp_distance(physics) < distance


def _closes(action: NDArray[np.float32]) -> bool:
    return bool(action[ARM_DIMS] > 0)
