"""An evaluation from request to results file."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import DEFAULT_ENGINES, Mode, Precision, protocol_name, to_json, with_protocol
from rsd_trt.errors import UserError
from rsd_trt.eval.results import Episode, EpisodeLog, Json, summarise, write_atomically
from rsd_trt.eval.rollout import run_episode, write_video
from rsd_trt.eval.simulator import Simulator, check_task, initial_states, open_suite
from rsd_trt.runtime.policy import Policy, check_device


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate. None: the bundle's own, or for `tasks` all of the suite's."""

    bundle: Path
    suite: str = "libero_spatial"
    tasks: tuple[int, ...] | None = None
    trials: int = 50
    mode: Mode = "rsd"
    backend: str = "torch"
    device: str = "auto"
    n_action_steps: int | None = None
    protocol: str | None = None
    max_steps: int | None = None
    seed: int = 7
    out: Path = Path("results")
    fresh: bool = False
    video: bool = False
    precision: Precision = "fp32"
    engines: Path = DEFAULT_ENGINES


def evaluate(
    request: EvalRequest,
    on_start: Callable[[int, list[Episode]], None],
    on_episode: Callable[[Episode], None],
    command: str,
) -> Json:
    """Runs the episodes that the run in `request.out` still lacks, and writes its results file.

    `on_start` is told the number of episodes in all and those that are there already.

    Raises:
        UserError: anything in the request that cannot be done here.
    """
    bundle = Bundle.open(request.bundle)
    control = bundle.config.control
    if request.protocol is not None:
        control = with_protocol(control, request.protocol)
    tasks = _tasks(request)
    max_steps = request.max_steps or control.max_steps.get(request.suite)
    if max_steps is None:
        raise UserError(f"the bundle's control.max_steps has no {request.suite}; give --max-steps")
    device = str(check_device(request.device))
    _seed_everything(request.seed)
    bundle = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, control=control))
    policy = Policy.load(
        bundle,
        request.mode,
        request.backend,
        device,
        request.n_action_steps,
        precision=request.precision,
        engines=request.engines,
    )
    settings: Json = {
        "suite": request.suite,
        "tasks": list(tasks),
        "trials": request.trials,
        "mode": request.mode,
        "backend": request.backend,
        "precision": request.precision,
        "backbone": "eager",
        "device": device,
        "protocol": protocol_name(control),
        "max_steps": max_steps,
        "n_action_steps": policy.n_action_steps,
        "seed": request.seed,
        "bundle": bundle.config.name,
        "bundle_sha256": bundle.fingerprint,
        "trained": bundle.config.trained,
        "rsd": to_json(bundle.config.rsd),
        "control": to_json(control),
        "hardware": host.hardware(device),
        "versions": host.versions(),
    }
    name = f"{request.suite}_{request.mode}"
    log = EpisodeLog(request.out / f"{name}_episodes.jsonl", settings, request.fresh)
    keys = [(task, trial) for task in tasks for trial in range(request.trials)]
    on_start(len(keys), list(log.episodes.values()))
    videos = request.out / "videos" / name if request.video else None
    for task in tasks:
        missing = [trial for trial in range(request.trials) if (task, trial) not in log.episodes]
        if not missing:
            continue
        with closing(Simulator(request.suite, task, control)) as simulator:
            for trial in missing:
                frames: list[NDArray[np.uint8]] | None = [] if videos else None
                episode = run_episode(policy, simulator, task, trial, max_steps, frames)
                if videos and frames:
                    outcome = "error" if episode.error else "success" if episode.success else "failure"
                    write_video(videos / f"task{task}_trial{trial}_{outcome}.mp4", frames)
                log.append(episode)
                on_episode(episode)
    summary = summarise(log.settings, list(log.episodes.values()), tasks, bundle.config.dims)
    summary |= {"command": command, "results_file": str(request.out / f"{name}_results.json")}
    write_atomically(Path(str(summary["results_file"])), json.dumps(summary, indent=1) + "\n")
    return summary


def _tasks(request: EvalRequest) -> dict[int, str]:
    """The instruction of every task of the request.

    Raises:
        UserError: a suite, task or trial that LIBERO does not have, or LIBERO cannot be used here.
    """
    benchmark = open_suite(request.suite)
    tasks = request.tasks if request.tasks is not None else tuple(range(benchmark.n_tasks))
    for task in tasks:
        check_task(benchmark, request.suite, task)
        available = len(initial_states(benchmark, task))
        if request.trials > available:
            raise UserError(
                f"{request.suite} has {available} initial states for task {task}, not {request.trials}: "
                f"--trials {available}"
            )
    return {task: str(benchmark.get_task(task).language) for task in tasks}


def _seed_everything(seed: int) -> None:
    """Seeds every generator, as OpenVLA-OFT's evaluation does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
