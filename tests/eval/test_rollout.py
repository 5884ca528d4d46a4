"""The episode loop on doubles: when it renders, when it ends, and what counts as an error."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from rsd_trt.eval.rollout import run_episode, write_video
from rsd_trt.eval.simulator import Simulator
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.plan import Query
from rsd_trt.runtime.policy import Policy


class FakePolicy:
    def __init__(self, chunk: int = 4, faults_at: int | None = None) -> None:
        self.chunk, self.faults_at, self.calls = chunk, faults_at, 0

    def reset(self, slot: int | None = None) -> None:
        self.calls = 0

    def act_batch(self, observations: list[Observation], slots: list[int]) -> list[Query]:
        self.calls += 1
        if self.calls == self.faults_at:
            return [Query(np.zeros((0, 7), np.float32), "full", fault="the hidden state after block 4 is not finite")]
        return [Query(np.zeros((self.chunk, 7), np.float32), "full", ms=2.0)]


class FakeSimulator:
    def __init__(self, solved_at: int | None = None, breaks_at: int | None = None) -> None:
        self.solved_at, self.breaks_at = solved_at, breaks_at
        self.rendered: list[bool] = []

    def reset(self, trial: int) -> None:
        self.rendered = []

    def step(self, action: NDArray[np.float32], render: bool) -> bool:
        self.rendered.append(render)
        if len(self.rendered) == self.breaks_at:
            raise RuntimeError("the GL context is lost")
        return len(self.rendered) == self.solved_at

    def observation(self) -> Observation:
        return Observation(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(8, np.float32), "lift")

    def frame(self) -> NDArray[np.uint8]:
        return np.zeros((8, 8, 3), np.uint8)


def run(policy: FakePolicy, simulator: FakeSimulator, max_steps: int = 10, frames: list | None = None):  # type: ignore[no-untyped-def, type-arg]
    return run_episode(cast(Policy, policy), cast(Simulator, simulator), 0, 0, max_steps, frames)


def test_renders_only_before_queries() -> None:
    simulator = FakeSimulator()
    episode = run(FakePolicy(chunk=4), simulator, max_steps=10)
    assert simulator.rendered == [False, False, False, True, False, False, False, True, False, True]
    assert (episode.success, episode.steps, episode.error) == (False, 10, None)
    assert [query.step for query in episode.queries] == [0, 4, 8]


def test_success_ends_the_episode_inside_a_chunk() -> None:
    simulator = FakeSimulator(solved_at=6)
    episode = run(FakePolicy(chunk=4), simulator)
    assert (episode.success, episode.steps, len(simulator.rendered)) == (True, 6, 6)


def test_a_fault_of_the_policy_is_an_error() -> None:
    episode = run(FakePolicy(faults_at=2), FakeSimulator())
    assert episode.error == "the hidden state after block 4 is not finite"
    assert (episode.success, episode.steps) == (False, 4)


def test_a_broken_simulator_is_an_error() -> None:
    episode = run(FakePolicy(), FakeSimulator(breaks_at=3))
    assert episode.error == "RuntimeError: the GL context is lost"
    assert not episode.success


def test_video_renders_every_step() -> None:
    frames: list[NDArray[np.uint8]] = []
    simulator = FakeSimulator(solved_at=5)
    run(FakePolicy(), simulator, frames=frames)
    assert simulator.rendered == [True] * 5
    assert len(frames) == 6


def test_write_video_makes_h264(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = [np.full((64, 64, 3), i * 10, np.uint8) for i in range(20)]
    path = tmp_path / "a" / "video.mp4"
    write_video(path, frames)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert (meta["codec"], meta["size"], meta["fps"]) == ("h264", (64, 64), 20.0)
    assert sum(1 for _ in reader) == 20
    assert list(path.parent.iterdir()) == [path]
