"""Demonstrations: seeds, what is executed, what is stored."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from examples.reference_policy.collect import MANIFEST, SUITE, Settings, main, plan, write_episode, write_manifest
from examples.reference_policy.data import load_demonstrations
from examples.reference_policy.demonstrate import (
    Burst,
    Demonstration,
    Perturbations,
    demonstrate,
    draw_disturbances,
    model_images,
    perturb,
)
from rsd_trt.config import ControlConfig
from rsd_trt.eval.libero.simulator import Simulator, initial_states, open_suite
from rsd_trt.eval.libero.target import DISPLACEMENT, TARGET, displace, offsets
from rsd_trt.runtime.pixels import resize


def test_existing_episodes_are_not_collected_again(tmp_path: Path) -> None:
    settings = Settings(tmp_path, episodes=3, tasks=(0, 4))
    wanted = plan(settings)
    assert [assignment.task for assignment in wanted] == [0, 4] * 3
    assert len({assignment.trial for assignment in wanted}) == 6
    settings.file(4, wanted[3].trial).touch()
    assert plan(settings) == [*wanted[:3], *wanted[4:]]


def test_the_processes_do_without_torch() -> None:
    code = "import sys, examples.reference_policy.collect; assert 'torch' not in sys.modules"
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
            executed = perturb(action, drawn, step, np.random.default_rng(step))
            assert np.abs(executed).max() <= 1
            assert abs(executed[-1]) == 1


def test_a_burst_replaces_the_action_while_it_lasts() -> None:
    action = np.array([1, -1, 0.5, 0, 0, 0, -1], np.float32)
    drawn = Perturbations(0.0, (Burst(2, 4, (0.5,) * 6, -1.0),), None, 0)
    executed = [perturb(action, drawn, step, np.random.default_rng(0)) for step in range(5)]
    assert [np.array_equal(x, action) for x in executed] == [True, True, False, False, True]
    assert executed[2].tolist() == [0.5] * 6 + [1.0]


def test_a_failed_episode_is_no_example(tmp_path: Path, demonstration: Callable[..., Demonstration]) -> None:
    settings = Settings(tmp_path)
    for episode, success in enumerate((False, True)):
        found = dataclasses.replace(demonstration(6, 1), success=success)
        write_episode(settings.file(0, episode), 0, episode, "", found)
    with h5py.File(settings.file(0, 0), "r") as failed:
        assert list(failed["data"]) == []
    data = load_demonstrations(tmp_path, torch.device("cpu"))
    assert (len(data.row), len(data.actions)) == (3, 6)
    write_manifest(settings, 1.0)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["tasks"]["0"] == {
        "attempts": 2,
        "success": 1,
        "displaced": 0,
        "slid": 0,
        "frames": 3,
        "success_share": 0.5,
    }
    assert manifest["seeds"] == {"succeeded": {"0": [1]}, "failed": {"0": [0]}}
    assert {"rsd-trt", "python", "mujoco"} <= manifest["versions"].keys()


def test_frames_come_back_with_the_actions_of_all_steps(
    tmp_path: Path, demonstration: Callable[..., Demonstration]
) -> None:
    both = [demonstration(9, 6), demonstration(5, 7)]
    for i, found in enumerate(both):
        write_episode(tmp_path / f"{i}.hdf5", 2, 6 + i, "pick up the bowl", found)
    data = load_demonstrations(tmp_path, torch.device("cpu"))
    assert data.row.tolist() == [1, 3, 5, 7, 10, 12]
    assert data.end.tolist() == [9] * 4 + [14] * 2
    assert data.task.tolist() == [2] * 6 and data.instructions == ("", "", "pick up the bowl")
    assert np.array_equal(data.actions, np.concatenate([found.actions for found in both]))
    assert np.array_equal(data.images, np.concatenate([found.images for found in both]))
    assert np.array_equal(data.proprio, np.concatenate([found.proprio for found in both]))


@pytest.mark.libero
def test_training_scenes_are_no_evaluation_states_and_the_bowl_can_be_displaced() -> None:
    stored = initial_states(open_suite(SUITE), 3)
    settings = Settings(Path())
    with closing(Simulator(SUITE, 3, ControlConfig(camera_size=64))) as simulator:
        for episode in range(3):
            simulator.sample(settings.seed(3, episode), render=False)
            state = simulator.physics.get_state().flatten()
            assert np.abs(stored[:, 1:] - state[1:]).max(1).min() > 1e-3  # the first number is the time
        del simulator._initial_states  # a demonstration does without them
        found = demonstrate(simulator, ControlConfig(), settings.seed(3, 0), 32, every=2, max_steps=4)
        assert (len(found.steps), len(found.actions)) == (2, 4)
        simulator.sample(settings.seed(3, 2), render=False)
        joint = f"{TARGET}_joint0"
        before = simulator.physics.data.get_joint_qpos(joint).copy()
        assert displace(simulator.physics, offsets(np.random.default_rng(0)))
        moved = (simulator.physics.data.get_joint_qpos(joint) - before)[:3]
        assert DISPLACEMENT[0] <= np.linalg.norm(moved) <= DISPLACEMENT[1]


@pytest.mark.slow
@pytest.mark.libero
def test_demonstrations_are_collected_with_a_policy_and_without(tmp_path: Path, tiny_bundle: Path) -> None:
    common = ["--episodes", "1", "--tasks", "2", "--workers", "1", "--every", "40", "--device", "cpu"]
    main(["--out", str(tmp_path / "alone"), *common])
    alone = load_demonstrations(tmp_path / "alone", torch.device("cpu"))
    assert len(alone.actions) > 40 and 0 < len(alone.row) <= len(alone.actions) / 40 + 1
    main(["--out", str(tmp_path / "both"), *common, "--policy", str(tiny_bundle)])
    manifest = json.loads((tmp_path / "both" / MANIFEST).read_text())
    assert manifest["tasks"]["2"]["attempts"] == 1
    before = (tmp_path / "alone" / "task2_seed1200000.hdf5").stat().st_mtime_ns
    main(["--out", str(tmp_path / "alone"), *common])
    assert (tmp_path / "alone" / "task2_seed1200000.hdf5").stat().st_mtime_ns == before
