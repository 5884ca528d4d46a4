"""One episode, and the process that the simulator runs in. Nothing here needs torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rsd_trt.errors import UserError, missing_extra
from rsd_trt.eval.libero.course import Course, Event, Perturbation
from rsd_trt.files import replacing
from rsd_trt.isolated import end_with_parent
from rsd_trt.runtime.observation import Observation

log = logging.getLogger(__name__)

VIDEO_FPS = 20  # the control rate: videos play in real time
STRIP_FRAMES = 6  # of a failed episode, side by side


class Environment(Protocol):
    """What an episode needs of `rsd_trt.eval.libero.simulator.Simulator`."""

    def reset(self, trial: int, render: bool) -> None: ...
    def step(self, action: NDArray[np.float32], render: bool) -> bool: ...
    def perturbed(self, perturbation: Perturbation) -> Course: ...
    def observation(self) -> Observation: ...
    def frame(self) -> NDArray[np.uint8]: ...
    def close(self) -> None: ...


EnvironmentT = TypeVar("EnvironmentT", bound=Environment)
Act = Callable[[EnvironmentT, int], NDArray[np.float32]]  # (simulator, step) -> the next actions [n, A]


@dataclass(frozen=True)
class Assignment:
    """An episode to run."""

    task: int
    trial: int
    max_steps: int
    failures: Path | None = None  # folder for film strips of failed episodes
    videos: Path | None = None  # folder for a video of the episode
    perturbation: Perturbation | None = None
    run: str = ""  # which of the runs that go on together it is of


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

    `act(simulator, step)` gives the next actions [n, A]. Images are rendered for the steps at which it is asked if
    it `looks` at them, and for all when a video is wanted.
    """
    started = time.perf_counter()
    every_step = assignment.videos is not None
    simulator.reset(assignment.trial, render=looks or every_step)
    course = simulator.perturbed(assignment.perturbation) if assignment.perturbation is not None else None
    frames = [simulator.frame()]
    executed: list[NDArray[np.float32]] = []
    success = False
    while len(executed) < assignment.max_steps and not success:
        actions = act(simulator, len(executed))[: assignment.max_steps - len(executed)]
        for i, action in enumerate(actions):
            rendered = every_step or (looks and i == len(actions) - 1)
            if course is not None:
                course.before_step(len(executed), action)
            success = simulator.step(action, render=rendered)
            executed.append(action)
            if rendered:
                frames.append(simulator.frame())
            if success:
                break
    event = None if course is None else course.event
    finished = Finished(success, np.array(executed, np.float32), time.perf_counter() - started, event)
    name = f"task{assignment.task}_trial{assignment.trial}"
    try:
        if assignment.videos is not None:
            outcome = "success" if success else "failure"
            write_video(assignment.videos / f"{name}_{outcome}.mp4", frames)
        if assignment.failures is not None and not success:
            write_strip(assignment.failures / f"{name}.jpg", frames)
    except OSError as error:
        raise UserError(f"{error.filename or name}: {error.strerror or error}") from None
    return finished


def serve(
    connection: Connection,
    build: Callable[[int], EnvironmentT],
    script: Callable[[EnvironmentT], NDArray[np.float32]] | None = None,
    run: Callable[[EnvironmentT, Assignment, Act[EnvironmentT], bool], Finished] = run_episode,
) -> None:
    """The simulator's process: runs the assignments that it is sent until the other end hangs up.

    `build(task)` makes the environment, which is kept for as long as the assignments are of its task. Sends an
    `Asking` for each query, to which the answer is actions or None (abandon the episode), and at the end of an
    episode a `Finished`. After a `Broken` the process ends: its simulator cannot be trusted any more.
    With a `script(environment)`, that gives the actions: nobody is asked, and no images are rendered for it.
    `run` is what an episode is, where it is no trial.
    """
    end_with_parent()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # whatever asks, nobody answers
    line = Line(connection)

    def act(simulator: EnvironmentT, step: int) -> NDArray[np.float32]:
        if script is not None:
            return script(simulator)
        line.send(Asking(simulator.observation(), step))
        actions = line.actions()
        if actions is None:
            raise Abandoned
        return actions

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

    def actions(self) -> NDArray[np.float32] | None:
        try:
            actions: NDArray[np.float32] | None = self._connection.recv()
        except (EOFError, OSError):
            raise HungUp from None
        return actions


def check_video_writer() -> None:
    """Raises UserError unless videos can be written."""
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise missing_extra("imageio-ffmpeg", "libero") from None


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """An MP4 (H.264) at the control rate; frames [S, S, 3] uint8."""
    import imageio_ffmpeg

    height, width, _ = frames[0].shape
    with replacing(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary), (width, height), fps=VIDEO_FPS, output_params=["-f", "mp4"], ffmpeg_log_level="error"
        )
        writer.send(None)
        for frame in frames:
            writer.send(frame)
        writer.close()


def write_strip(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """A JPEG of up to `STRIP_FRAMES` frames [S, S, 3] uint8 side by side, evenly from the first to the last."""
    from PIL import Image

    chosen = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate([frames[i] for i in chosen], axis=1)).save(temporary, "JPEG", quality=80)
