"""An object that slides: a little further before every control step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd_trt.eval.libero.body import Body
from rsd_trt.eval.libero.course import Event, Happening, Offset

if TYPE_CHECKING:
    from robosuite.utils.binding_utils import MjSim

CONTROL_SECONDS = 0.05  # of a control step
STRAYED = 0.005  # m that the object may have been pushed by until the slide is due
TRIES = 16  # paths, in the order in which they are drawn


class Slide:
    """Takes a body through `places`, one before each control step, from the first step that `begins`.

    Its position is set, and its velocity, so that the step's physics agree: a velocity alone dies of friction within
    milliseconds. It is over, for good, at the last place, when `ends` says so of an action, when anything touches the
    body, or when there is no room at the next place.
    """

    def __init__(
        self,
        kind: Happening,
        body: Body,
        places: Iterable[Offset],
        begins: Callable[[int], bool],
        ends: Callable[[NDArray[np.float32]], bool] = lambda action: False,
    ) -> None:
        self._kind: Happening = kind
        self._body = body
        self._places: Iterator[Offset] = iter(places)
        self._begins, self._ends = begins, ends
        self._at: Offset = (0.0, 0.0)
        self._next = next(self._places, None)
        self.event: Event | None = None

    def before_step(self, step: int, action: NDArray[np.float32]) -> None:
        if self._next is None or (self.event is None and not self._begins(step)):
            return
        strayed = float(np.linalg.norm(self._body.position[:2] - self._body.home[:2] - self._at))
        if (
            strayed > STRAYED
            or self._ends(action)
            or self._body.touched
            or not self._body.reach([self._next], self._at)
        ):
            self._next = None
            return
        before, self._at, self._next = self._at, self._next, next(self._places, None)
        speed = 0.0 if self._next is None else 1 / CONTROL_SECONDS
        self._body.put(self._at, ((self._at[0] - before[0]) * speed, (self._at[1] - before[1]) * speed))
        self.event = Event(self._kind, step if self.event is None else self.event.step, self._at)


class Still:
    """The course of a perturbation that the scene has no room for."""

    event: Event | None = None

    def before_step(self, step: int, action: NDArray[np.float32]) -> None:
        pass


def straight(angle: float, distance: float, steps: int) -> list[Offset]:
    """`steps` places, evenly along a line of that length; the last one is its end."""
    return [
        (float(reach * np.cos(angle)), float(reach * np.sin(angle)))
        for reach in distance * np.arange(1, steps + 1) / steps
    ]


def body_names(physics: MjSim) -> list[str]:
    """The free objects of a scene."""
    names: list[str] = list(physics.model.joint_names)
    return [name.removesuffix("_joint0") for name in names if physics.model._model.joint(name).type[0] == FREE]


FREE = 0  # mujoco.mjtJoint.mjJNT_FREE
