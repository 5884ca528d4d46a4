"""LIBERO's real simulator against OpenVLA-OFT's protocol, written out plainly."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
from numpy.typing import NDArray

from rsd_trt.config import ControlConfig
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.rendering import choose_gl, gpu_number, render_on
from rsd_trt.eval.libero.simulator import IDLE, Simulator, axis_angle, open_suite

SMALL = ControlConfig(camera_size=64)
ACTION = np.array([0.3, -0.2, 0.1, 0.0, 0.1, 0.0, 1.0], np.float32)
HALF = np.sqrt(0.5)


@pytest.mark.parametrize(
    ("quaternion", "expected"),
    [
        ([0, 0, 0, 1], [0, 0, 0]),
        ([0, 0, 0, -1], [0, 0, 0]),
        ([HALF, 0, 0, HALF], [np.pi / 2, 0, 0]),
        ([-HALF, 0, 0, -HALF], [np.pi / 2, 0, 0]),
        ([0, HALF, 0, -HALF], [0, -np.pi / 2, 0]),
        ([0, 0, 1, 0], [0, 0, np.pi]),
    ],
)
def test_axis_angle(quaternion: list[float], expected: list[float]) -> None:
    assert axis_angle(np.array(quaternion, float)) == pytest.approx(np.array(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("quaternion", "expected"),
    [
        ([0, 0, 0, 1], [0, 0, 0]),
        ([0, 0, 0, -1], [0, 0, 0]),
        ([HALF, 0, 0, HALF], [np.pi / 2, 0, 0]),
        ([-HALF, 0, 0, -HALF], [-3 * np.pi / 2, 0, 0]),
        ([1, 0, 0, 0], [np.pi, 0, 0]),
        ([np.cos(0.1), 0, 0, -np.sin(0.1)], [np.pi + 0.2, 0, 0]),
        ([0, 0, 0, -1.0000001], [0, 0, 0]),
    ],
)
def test_axis_angle_as_openvla_oft_takes_it(quaternion: list[float], expected: list[float]) -> None:
    assert axis_angle(np.array(quaternion, float), "robosuite") == pytest.approx(np.array(expected), abs=1e-6)


def test_no_opengl_is_one_line_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(UserError, match="apt-get install libegl1"):
        choose_gl()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(UserError, match="apt-get install libosmesa6"):
        choose_gl()


@pytest.mark.parametrize(
    ("device", "visible", "number"),
    [
        ("cpu", None, None),
        ("cuda", None, 0),
        ("cuda:2", None, 2),
        ("cuda", "3", 3),
        ("cuda:1", "3, 1", 1),
        ("cuda:2", "3,1", None),
        ("cuda", "GPU-5e3", None),
        ("cuda", "", None),
    ],
)
def test_simulators_render_on_the_gpu_of_their_policy(
    device: str, visible: str | None, number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_number(device) == number


@pytest.mark.libero
def test_a_gpu_that_opengl_does_not_have_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "9")  # so that it is as before afterwards
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID")
    render_on(99)
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ
    render_on(0)
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == "0"
    render_on(1)
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == "0"


def test_unknown_suite() -> None:
    with pytest.raises(UserError, match="did you mean 'libero_spatial'"):
        open_suite("libero_spacial")


def oft_trials(
    suite: str, task: int, count: int
) -> list[tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]]:
    """(image, simulator state, end-effector position) after settling and three actions, for the first trials."""
    benchmark = open_suite(suite)
    from libero.libero.envs import OffScreenRenderEnv

    bddl = benchmark.get_task_bddl_file_path(task)
    env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=64, camera_widths=64)
    env.seed(0)
    found = []
    for state in benchmark.get_task_init_states(task)[:count]:
        env.reset()
        env.set_init_state(state)
        for action in [IDLE] * 10 + [ACTION] * 3:
            observation, *_ = env.step(list(action))
        found.append((observation["agentview_image"], env.get_sim_state(), observation["robot0_eef_pos"]))
    env.close()
    return found


@pytest.mark.slow
@pytest.mark.libero
@pytest.mark.parametrize(("suite", "task"), [("libero_spatial", 4), ("libero_10", 2)])  # a drawer; a stove's knob
def test_trials_are_openvla_ofts_in_any_order(suite: str, task: int) -> None:
    expected = oft_trials(suite, task, 3)
    random = np.random.default_rng(0)
    with closing(Simulator(suite, task, SMALL)) as simulator:
        for trial in (2, 0, 1):
            simulator.reset(trial)
            for i in range(3):
                simulator.step(ACTION, render=i == 2)
            image, state, position = expected[trial]
            observation = simulator.observation()
            assert np.array_equal(observation.images[0], image)
            assert np.array_equal(simulator._env.get_sim_state(), state)
            assert np.array_equal(observation.proprio[:3], position.astype(np.float32))
            for _ in range(30):  # leave a mess for the next reset
                simulator.step(random.uniform(-1, 1, 7).astype(np.float32), render=False)
    images = [image for image, _, _ in expected]
    assert not np.array_equal(images[0], images[1])


@pytest.mark.slow
@pytest.mark.libero
def test_a_step_is_robosuites_bit_for_bit() -> None:
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (80, 7)).astype(np.float32)
    actions[:, 2] -= 0.5  # down to the table, and the gripper open and closed
    actions[:, 6] = np.where(np.arange(80) // 20 % 2, 1, -1)

    def course(step: Callable[[NDArray[np.float32]], object]) -> list[dict[str, NDArray[np.float64]]]:
        simulator.reset(0, render=False)
        seen = []
        for action in actions:
            step(action)
            raw = simulator._env.env._get_observations()
            seen.append({name: value for name, value in raw.items() if "image" not in name})
            seen[-1]["state"] = simulator._env.get_sim_state()
            seen[-1]["sensors"] = simulator.physics.data._data.sensordata.copy()
        return seen

    with closing(Simulator("libero_spatial", 4, SMALL)) as simulator:
        ours = course(lambda action: simulator.step(action, render=False))
        theirs = course(lambda action: simulator._env.step(action.astype(np.float64)))
    for mine, original in zip(ours, theirs, strict=True):
        assert all(np.array_equal(mine[name], original[name]) for name in original)


@pytest.mark.slow
@pytest.mark.libero
def test_a_sampled_scene_is_that_of_a_newly_compiled_model() -> None:
    """LIBERO places a bowl on the cabinet where the model has the cabinet at that moment."""
    benchmark = open_suite("libero_spatial")
    from libero.libero.envs import OffScreenRenderEnv

    env = OffScreenRenderEnv(bddl_file_name=benchmark.get_task_bddl_file_path(9), camera_heights=8, camera_widths=8)
    np.random.seed(1001)
    env.reset()
    for _ in range(10):
        env.step(list(IDLE))
    expected = env.get_sim_state()
    env.close()
    with closing(Simulator("libero_spatial", 9, SMALL)) as simulator:
        for seed in (1000, 1001):
            simulator.sample(seed)
        assert np.array_equal(simulator._env.get_sim_state(), expected)


@pytest.mark.slow
@pytest.mark.libero
def test_sampled_scenes_repeat_by_seed_and_are_no_trial() -> None:
    with closing(Simulator("libero_spatial", 4, SMALL)) as simulator:
        states = []
        for seed in (1000, 1001, 1000):
            simulator.sample(seed)
            states.append(simulator._env.get_sim_state())
            simulator.step(ACTION, render=False)
        assert np.array_equal(states[0], states[2])
        assert not np.array_equal(states[0], states[1])
        simulator.reset(0)
        assert not np.array_equal(states[0], simulator._env.get_sim_state())


@pytest.mark.libero
def test_a_lost_gl_context_is_an_error_and_not_a_wrong_image() -> None:
    with closing(Simulator("libero_spatial", 0, SMALL)) as simulator:
        simulator.reset(0)
        simulator.physics._render_context_offscreen.gl_ctx.free()
        simulator.step(ACTION, render=False)
        with pytest.raises(RuntimeError, match="the OpenGL context is lost"):
            simulator.step(ACTION, render=True)


@pytest.mark.slow
@pytest.mark.libero
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "GPU-00000000", "MUJOCO_EGL_DEVICE_ID": "0"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "", "PYOPENGL_PLATFORM": "glx"}, ""),
        ({"MUJOCO_EGL_DEVICE_ID": "7"}, "MUJOCO_EGL_DEVICE_ID is '7': .* Unset it, or set it to 0"),
        ({"MUJOCO_EGL_DEVICE_ID": "x"}, "MUJOCO_EGL_DEVICE_ID is 'x', not the number of a device. Unset it"),
    ],
    ids=str,
)
def test_it_renders_whatever_the_environment_holds(environment: dict[str, str], message: str) -> None:
    code = (
        "import os\n"
        "from rsd_trt.config import ControlConfig\n"
        "from rsd_trt.eval.libero.simulator import Simulator\n"
        "simulator = Simulator('libero_spatial', 0, ControlConfig(camera_size=64, settle_steps=1))\n"
        "simulator.reset(0)\n"
        "assert simulator.observation().images.any()\n"
        "print(os.environ.get('CUDA_VISIBLE_DEVICES'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    if message:
        assert re.search(message, done.stderr), done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{environment['CUDA_VISIBLE_DEVICES']}\n"


@pytest.mark.libero
def test_the_log_of_another_user_is_not_opened() -> None:
    code = "import sys\nfrom rsd_trt.eval.libero.simulator import open_suite\n"
    code += "sys.addaudithook(lambda event, a: event != 'open' or 'robosuite.log' not in str(a[0]) or 1 / 0)\n"
    code += "open_suite('libero_spatial')\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
