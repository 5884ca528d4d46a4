"""One episode, and the process that the simulator runs in. Nothing here needs torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import state_and_seed
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.course import Course, Event, Perturbation
from rsd_trt.eval.libero.film import Film, write_strip, write_video
from rsd_trt.files import explained
from rsd_trt.isolated import end_with_parent
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.speculate import Route

log = logging.getLogger(__name__)


class Environment(Protocol):
    """What an episode needs of `rsd_trt.eval.libero.simulator.Simulator`."""

    def reset(self, trial: int, render: bool) -> None: ...
    def step(self, action: NDArray[np.float32], render: bool) -> bool: ...
    def perturbed(self, perturbation: Perturbation) -> Course: ...
    def observation(self) -> Observation: ...
    def views(self) -> NDArray[np.uint8]: ...
    def close(self) -> None: ...


EnvironmentT = TypeVar("EnvironmentT", bound=Environment)


@dataclass(frozen=True)
class Answer:
    """To the simulator's process: the next actions, and how the query went."""

    actions: NDArray[np.float32]  # [n, A]
    route: Route | None = None  # None: of a script


Act = Callable[[EnvironmentT, int], Answer]  # (simulator, step)


@dataclass(frozen=True)
class Assignment:
    """An episode to run."""

    task: int
    trial: int
    max_steps: int
    strips: Path | None = None  # folder for a film strip of the episode
    videos: Path | None = None  # folder for a video of the episode, which has the name of what acts
    perturbation: Perturbation | None = None
    run: str = ""  # which of the runs that go on together it is of
    seeds: int = 1  # that the run's perturbation has

    @property
    def state(self) -> int:
        """The suite's initial state that it begins in."""
        return state_and_seed(self.trial, self.seeds)[0]


@dataclass(frozen=True)
class Asking:
    """From the simulator's process: what to do at this step?"""

    observation: Observation
    step: int


@dataclass(frozen=True)
class Finished:
    """From the simulator's process: the episode is over."""

    success: bool
    actions: NDArray[np.float32]  # [steps, A], executed
    seconds: float
    event: Event | None = None  # what the assignment's perturbation did


@dataclass(frozen=True)
class Broken:
    """From the simulator's process: it broke. `refused`: it cannot work on this machine at all."""

    message: str
    refused: bool = False


class Abandoned(Exception):
    """The policy has nothing more to say: the episode ends here."""


class HungUp(Exception):
    """There is nobody to talk to any more."""


def run_episode(
    simulator: EnvironmentT,
    assignment: Assignment,
    act: Act[EnvironmentT],
    looks: bool = True,
) -> Finished:
    """One trial: success when the environment says so within the assignment's steps.

    `act(simulator, step)` answers a query. Images are rendered for the steps at which it is asked if
    it `looks` at them, and for all when a video is wanted.
    """
    started = time.perf_counter()
    every_step = assignment.videos is not None
    simulator.reset(assignment.state, render=looks or every_step)
    course = simulator.perturbed(assignment.perturbation) if assignment.perturbation is not None else None
    film = Film(simulator.observation().instruction, assignment.videos.name if assignment.videos else "")
    film.look(0, _look(simulator, every_step))
    executed: list[NDArray[np.float32]] = []
    success = False
    while len(executed) < assignment.max_steps and not success:
        answer = act(simulator, len(executed))
        actions = answer.actions[: assignment.max_steps - len(executed)]
        film.query(answer.route)
        for i, action in enumerate(actions):
            rendered = every_step or (looks and i == len(actions) - 1)
            if course is not None:
                course.before_step(len(executed), action)
            success = simulator.step(action, render=rendered)
            executed.append(action)
            if rendered:
                film.look(len(executed), _look(simulator, every_step))
            if success:
                break
    film.outcome = "success" if success else "failure"
    if assignment.strips is not None and film.steps[-1] < len(executed):  # solved within a chunk: seen a step later
        simulator.step(executed[-1], render=True)
        film.look(len(executed), _look(simulator, every_step))
    event = None if course is None else course.event
    finished = Finished(success, np.array(executed, np.float32), time.perf_counter() - started, event)
    name = f"task{assignment.task}_trial{assignment.trial}"
    with explained(Path(name)):
        if assignment.videos is not None:
            seen = film.frames((event.kind, event.step) if event is not None else None)
            write_video(assignment.videos / f"{name}_{film.outcome}.mp4", seen)
        if assignment.strips is not None:
            write_strip(assignment.strips / f"{name}.jpg", film.strip())
    return finished


def _look(simulator: Environment, whole: bool) -> NDArray[np.uint8]:
    """What is kept of a frame: all views for a video, else the first for a film strip."""
    views = simulator.views()
    return views if whole else views[:1].copy()


def serve(
    connection: Connection,
    build: Callable[[int], EnvironmentT],
    script: Callable[[EnvironmentT], NDArray[np.float32]] | None = None,
    run: Callable[[EnvironmentT, Assignment, Act[EnvironmentT], bool], Finished] = run_episode,
) -> None:
    """The simulator's process: runs the assignments that it is sent until the other end hangs up.

    `build(task)` makes the environment, which is kept for as long as the assignments are of its task. Sends an
    `Asking` for each query, to which comes an `Answer` or None (abandon the episode), and at the end of an
    episode a `Finished`. After a `Broken` the process ends: its simulator cannot be trusted any more.
    With a `script(environment)`, that gives the actions: nobody is asked, and no images are rendered for it.
    `run` is what an episode is, where it is no trial.
    """
    end_with_parent()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # whatever asks, nobody answers
    line = Line(connection)

    def act(simulator: EnvironmentT, step: int) -> Answer:
        if script is not None:
            return Answer(script(simulator))
        line.send(Asking(simulator.observation(), step))
        answer = line.answer()
        if answer is None:
            raise Abandoned
        return answer

    try:
        assignment = line.assignment()
        while True:
            task = assignment.task
            with closing(build(task)) as simulator:
                while assignment.task == task:
                    with suppress(Abandoned):
                        line.send(run(simulator, assignment, act, script is None))
                    assignment = line.assignment()
    except HungUp:
        return
    except UserError as error:
        broken = Broken(str(error), refused=True)
    except Exception as error:  # whatever breaks inside the simulator
        log.exception("task %d, trial %d broke", assignment.task, assignment.trial)
        broken = Broken(f"{type(error).__name__}: {error}")
    with suppress(HungUp):
        line.send(broken)


class Line:
    """The simulator's end of the connection. Raises HungUp when there is nobody at the other."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: Asking | Finished | Broken) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise HungUp from None

    def assignment(self) -> Assignment:
        try:
            assignment: Assignment = self._connection.recv()
        except (EOFError, OSError):
            raise HungUp from None
        return assignment

    def answer(self) -> Answer | None:
        try:
            answer: Answer | None = self._connection.recv()
        except (EOFError, OSError):
            raise HungUp from None
        return answer
