"""Perturbations that leave the task as it is: a distractor slides, the light changes, or the cameras freeze."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsd_trt.eval.libero.body import Body
from rsd_trt.eval.libero.course import Course, Event, Scene
from rsd_trt.eval.libero.slide import TRIES, Slide, body_names, straight
from rsd_trt.eval.libero.target import TARGET

PLATE = "plate_1"  # where the target is to be put
BEGINS = (5, 31)  # a harmless change comes before one of these steps
DISTANCE = (0.03, 0.06)  # m that a distractor slides
SLIDE_STEPS = (5, 11)
KEPT_AWAY = 0.15  # m between a distractor and both target and plate
LIGHTS = (0.4, 0.7, 1.3, 1.6)  # times the usual light: the ends of a darker range, and of a brighter one

FREEZES = (8, 41)  # frames freeze before one of these steps
FROZEN_STEPS = 5


@dataclass(frozen=True)
class Harmless:
    """A distractor slides, or the light changes: also where no distractor has room."""

    step: int
    factor: float  # of the light
    distractor: bool
    order: float  # in 0..1: which of the distractors is the first to be tried
    steps: int  # of the slide
    candidates: tuple[tuple[float, float], ...]  # angle in rad, distance in m

    def begin(self, scene: Scene) -> Course:
        slide = self._slide(scene) if self.distractor else None
        return slide or Light(self, scene)

    def _slide(self, scene: Scene) -> Slide | None:
        """Of the first distractor and candidate that there is room for."""
        bodies = {name: Body(scene.physics, name) for name in body_names(scene.physics)}
        kept = [bodies.pop(name) for name in (TARGET, PLATE)]
        distractors = list(bodies.values())
        first = int(self.order * len(distractors))
        for body in distractors[first:] + distractors[:first]:
            if any(other.id in body.supports or body.id in other.supports for other in kept):
                continue
            for angle, distance in self.candidates:
                places = straight(angle, distance, self.steps)
                ends = [body.home[:2] + place for place in ((0.0, 0.0), places[-1])]
                apart = min(np.linalg.norm(end - other.home[:2]) for end in ends for other in kept)
                if apart > KEPT_AWAY and body.reach(places) == self.steps and body.rests(places[-1]):
                    return Slide("distractor", body, places, lambda step: step >= self.step)
        return None


class Light:
    """The course of a change of the light."""

    def __init__(self, perturbation: Harmless, scene: Scene) -> None:
        self._perturbation, self._scene = perturbation, scene
        self.event: Event | None = None

    def before_step(self, step: int, action: NDArray[np.float32]) -> None:
        if step == self._perturbation.step:
            self._scene.light(self._perturbation.factor)
            self.event = Event("light", step)


def draw_harmless(random: np.random.Generator) -> Harmless:
    dark, bright = random.uniform(*LIGHTS[:2]), random.uniform(*LIGHTS[2:])
    return Harmless(
        step=int(random.integers(*BEGINS)),
        factor=float(dark if random.random() < 0.5 else bright),
        distractor=bool(random.random() < 0.5),
        order=float(random.random()),
        steps=int(random.integers(*SLIDE_STEPS)),
        candidates=tuple((random.uniform(0.0, 2 * np.pi), random.uniform(*DISTANCE)) for _ in range(TRIES)),
    )


@dataclass(frozen=True)
class Frozen:
    """For `FROZEN_STEPS` steps every camera repeats its frame of the first one; the robot's own state goes on."""

    step: int

    def begin(self, scene: Scene) -> Course:
        return Freeze(self, scene)


class Freeze:
    """The course of a `Frozen`."""

    def __init__(self, perturbation: Frozen, scene: Scene) -> None:
        self._start, self._scene = perturbation.step, scene
        self.event: Event | None = None

    def before_step(self, step: int, action: NDArray[np.float32]) -> None:
        if step == self._start - 1:
            self._scene.cameras = "on"  # the frame that will be repeated, whether anybody asks for it or not
        elif step == self._start:
            self._scene.cameras = "frozen"
            self.event = Event("frozen", step)
        elif step == self._start + FROZEN_STEPS:
            self._scene.cameras = "asked"


def draw_frozen(random: np.random.Generator) -> Frozen:
    return Frozen(int(random.integers(*FREEZES)))
