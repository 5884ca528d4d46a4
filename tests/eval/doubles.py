"""A simulator and a policy that need neither LIBERO nor weights; the simulator's processes import them from here."""

from __future__ import annotations

import os
import signal
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.config import PROPRIO_DIM, ControlConfig, Dims
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.course import Course, Event, Offset, Perturbation
from rsd_trt.eval.libero.target import Displace
from rsd_trt.runtime.chunk import Query
from rsd_trt.runtime.observation import Observation

SIDE = 8  # pixels


@dataclass
class World:
    """A simulator whose images show all that has been done to it, and that succeeds at a step of the trial's own."""

    task: int
    side: int = SIDE
    cameras: int = 1
    state: NDArray[np.float64] = field(default_factory=lambda: np.zeros(Dims().A))
    trial: int = -1
    rendered: list[bool] = field(default_factory=list)
    displaced: list[tuple[int, Offset]] = field(default_factory=list)  # (steps done by then, by how much)

    def reset(self, trial: int, render: bool) -> None:
        self.trial, self.rendered, self.displaced = trial, [], []
        self.state = np.full(Dims().A, 0.1 * trial + self.task)

    def step(self, action: NDArray[np.float32], render: bool) -> bool:
        self.rendered.append(render)
        self.state = np.sin(3 * self.state + action)  # a small difference grows
        return bool(self.state[0] > 0.9) and len(self.rendered) > self.trial + 3

    def perturbed(self, perturbation: Perturbation) -> Course:
        assert isinstance(perturbation, Displace)
        return Shove(self, perturbation)

    def observation(self) -> Observation:
        shape = (self.cameras, self.side, self.side, 3)
        images = np.random.default_rng(zlib.crc32(self.state.tobytes())).integers(0, 256, shape, dtype=np.uint8)
        proprio = np.resize(self.state, PROPRIO_DIM).astype(np.float32)
        proprio[-1] = len(self.rendered)
        return Observation(images, proprio, f"task {self.task}")

    def views(self) -> NDArray[np.uint8]:
        return np.full((self.cameras, self.side, self.side, 3), len(self.rendered) % 256, np.uint8)

    def close(self) -> None:
        self.state = np.zeros(Dims().A)


@dataclass
class Shove:
    """The course of a displacement in a `World`: by the first candidate to the right, if there is one."""

    world: World
    perturbation: Displace
    event: Event | None = None

    def before_step(self, step: int, action: NDArray[np.float32]) -> None:
        offset = next((offset for offset in self.perturbation.offsets if offset[0] > 0), None)
        if step == self.perturbation.step and offset is not None:
            self.world.displaced.append((len(self.world.rendered), offset))
            self.world.state = self.world.state + offset[0]
            self.event = Event("displace", step, offset)


@dataclass
class Troubled(World):
    """A world with an accident at step 2 of trial 1: `how` it goes wrong, and how often (`marks` counts)."""

    how: str = ""
    times: int = 1
    marks: Path = Path()

    def step(self, action: NDArray[np.float32], render: bool) -> bool:
        if self.trial == 1 and len(self.rendered) == 2 and len(list(self.marks.iterdir())) < self.times:
            (self.marks / str(time.monotonic_ns())).touch()
            if self.how == "dies":
                os.kill(os.getpid(), 9)
            if self.how == "hangs":
                time.sleep(3600)
            if self.how == "freezes":
                Connection.send = freeze  # type: ignore[method-assign]
                return super().step(action, render)
            raise RuntimeError("the GL context is lost")
        return super().step(action, render)


def freeze(connection: Connection, message: object) -> None:
    """Says that 1000 bytes are coming, sends 100 of them and stops the process."""
    os.write(connection.fileno(), struct.pack("!i", 1000) + bytes(100))
    os.kill(os.getpid(), signal.SIGSTOP)


def world(suite: str, task: int, control: ControlConfig, gpu: int | None = None) -> World:
    """In the place of `Simulator`."""
    return Held(task, side=control.camera_size, cameras=len(control.cameras))


@dataclass
class Held(World):
    """A world for runs that are stopped in the middle, however fast the machine is: no trial begins once the file that
    the environment's `HOLD_BY` names has `HOLD_AT` lines."""

    def reset(self, trial: int, render: bool) -> None:
        while "HOLD_BY" in os.environ and lines(Path(os.environ["HOLD_BY"])) >= int(os.environ["HOLD_AT"]):
            time.sleep(0.05)
        super().reset(trial, render)

    def step(self, action: NDArray[np.float32], render: bool) -> bool:
        time.sleep(0.02)  # so that trials are under way when the run is stopped
        return super().step(action, render)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@dataclass
class Broken(World):
    """A world that never starts."""

    def reset(self, trial: int, render: bool = True) -> None:
        raise RuntimeError("no")


def shake(world: World) -> NDArray[np.float32]:
    """A script: one action, from all that is known of the world."""
    return np.resize(np.cos(world.state), (1, Dims().A)).astype(np.float32)


def unusable(task: int) -> World:
    raise UserError("no headless OpenGL for EGL or OSMesa: apt-get install libegl1")


@dataclass
class Reader:
    """A policy that answers from the image alone. From step `fault_step` of task 0 on, its answers are wrong."""

    chunk: int = 2
    fault: str = ""
    fault_step: int = 4
    seconds: float = 0.0  # that a forward takes
    batches: list[int] = field(default_factory=list)

    def reset(self, environment: int | None = None, episode: tuple[int, ...] | None = None) -> None:
        assert environment is not None

    def act_batch(self, observations: Sequence[Observation], environments: Sequence[int]) -> list[Query]:
        self.batches.append(len(environments))
        time.sleep(self.seconds)
        wrong = [
            bool(self.fault) and o.instruction == "task 0" and o.proprio[-1] >= self.fault_step for o in observations
        ]
        if self.fault == "raises" and any(wrong):
            raise ValueError("images are uint8 (1, 9, 9, 3)")
        queries = []
        for observation, bad in zip(observations, wrong, strict=True):
            actions = np.resize(observation.images[0, 0] / 255.0, (self.chunk, Dims().A)).astype(np.float32)
            query = Query(actions, "full", ms=1.0)
            if bad and self.fault == "nan":
                query = structs.replace(query, actions=actions * np.nan)
            if bad and self.fault == "shape":
                query = structs.replace(query, actions=actions[:, :3])
            if bad and self.fault == "told":
                query = structs.replace(
                    query, actions=actions[:0], fault="the hidden state after block 4 is not finite"
                )
            queries.append(query)
        return queries
