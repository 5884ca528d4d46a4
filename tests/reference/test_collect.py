"""Demonstrations: seeds, what is executed, what is stored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from rsd_trt.config import ControlConfig
from rsd_trt.eval.disturb import DISPLACEMENT, TARGET, offsets
from rsd_trt.eval.simulator import Simulator, initial_states, open_suite
from rsd_trt.reference.collect import LAG, SUITE, Job, Settings, plan, take, write_chunk
from rsd_trt.reference.demonstrate import (
    Burst,
    Demonstration,
    Disturbances,
    disturb,
    draw_disturbances,
    model_images,
)
from rsd_trt.runtime.preprocess import resize


def test_existing_chunks_are_not_collected_again(tmp_path: Path) -> None:
    settings = Settings(tmp_path, episodes=7, chunk=3, tasks=(0, 4))
    jobs = plan(settings)
    assert [(job.task, job.chunk, len(job.seeds)) for job in jobs] == [
        (0, 0, 3),
        (4, 0, 3),
        (0, 1, 3),
        (4, 1, 3),
        (0, 2, 1),
        (4, 2, 1),
    ]
    assert len({seed for job in jobs for seed in job.seeds}) == 14
    settings.file(4, 1).touch()
    assert Job(4, 1, jobs[3].seeds) not in plan(settings)
    assert len(plan(settings)) == 5


def test_a_process_stays_with_its_task_while_there_are_chunks() -> None:
    jobs = [Job(task, chunk, ()) for chunk, task in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1)]]
    taken = [take(jobs, 0) for _ in range(3)]
    assert [job.task if job else None for job in taken] == [0, 0, 1]
    assert [job.task for job in jobs] == [1, 1]
    assert take([], 0) is None


def test_a_task_that_lags_behind_is_helped() -> None:
    jobs = [Job(0, 0, ()), *(Job(1, chunk, ()) for chunk in range(LAG + 1))]
    taken = [take(jobs, 0) for _ in range(3)]
    assert [job.task if job else None for job in taken] == [1, 0, 1]


def test_the_processes_do_without_torch() -> None:
    code = "import sys, rsd_trt.reference.collect; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_images_are_those_that_the_preprocessor_makes() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    expected = resize(torch.from_numpy(images).flip(1, 2).permute(0, 3, 1, 2).float(), 128)
    assert np.array_equal(model_images(images, ControlConfig(), 128), expected.permute(0, 2, 3, 1).numpy())


def test_disturbances_repeat_by_seed_and_stay_in_range() -> None:
    action = np.array([1, -1, 0.5, 0, 0, 0, -1], np.float32)
    for seed in range(50):
        drawn = draw_disturbances(np.random.default_rng(seed))
        assert drawn == draw_disturbances(np.random.default_rng(seed))
        for step in range(100):
            executed = disturb(action, drawn, step, np.random.default_rng(step))
            assert np.abs(executed).max() <= 1
            assert abs(executed[-1]) == 1


def test_a_burst_replaces_the_action_while_it_lasts() -> None:
    action = np.array([1, -1, 0.5, 0, 0, 0, -1], np.float32)
    drawn = Disturbances(0.0, (Burst(2, 4, (0.5,) * 6, -1.0),), None, 0)
    executed = [disturb(action, drawn, step, np.random.default_rng(0)) for step in range(5)]
    assert [np.array_equal(x, action) for x in executed] == [True, True, False, False, True]
    assert executed[2].tolist() == [0.5] * 6 + [1.0]


def test_a_chunk_without_a_success_can_be_written(tmp_path: Path) -> None:
    assert write_chunk(tmp_path / "chunk.npz", Job(0, 0, (1,)), "", {}, [1], []) == 0


def test_rows_point_at_the_frames_actions(tmp_path: Path, demonstration: Callable[..., Demonstration]) -> None:
    kept = {seed: demonstration(steps, seed) for seed, steps in ((5, 6), (6, 9))}
    assert write_chunk(tmp_path / "chunk.npz", Job(0, 0, (5, 6)), "", kept, [], []) == 7
    with np.load(tmp_path / "chunk.npz") as arrays:
        assert arrays["row"].tolist() == [1, 3, 5, 6 + 1, 6 + 3, 6 + 5, 6 + 7]
        assert arrays["end"].tolist() == [6] * 3 + [15] * 4
        assert arrays["seed"].tolist() == [5] * 3 + [6] * 4
        assert np.array_equal(arrays["actions"][6:], kept[6].actions)


@pytest.mark.libero
def test_training_scenes_are_no_evaluation_states_and_the_bowl_can_be_displaced() -> None:
    stored = initial_states(open_suite(SUITE), 3)
    settings = Settings(Path())
    with closing(Simulator(SUITE, 3, ControlConfig(camera_size=64))) as simulator:
        for episode in range(3):
            simulator.sample(settings.seed(3, episode), render=False)
            state = simulator.physics.get_state().flatten()
            assert np.abs(stored[:, 1:] - state[1:]).max(1).min() > 1e-3  # the first number is the time
        joint = f"{TARGET}_joint0"
        before = simulator.physics.data.get_joint_qpos(joint).copy()
        assert simulator.displace(offsets(np.random.default_rng(0)))
        moved = (simulator.physics.data.get_joint_qpos(joint) - before)[:3]
        assert DISPLACEMENT[0] <= np.linalg.norm(moved) <= DISPLACEMENT[1]
