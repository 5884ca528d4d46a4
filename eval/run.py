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
from rsd_trt.config import DEFAULT_ENGINES, Mode, Precision, protocol_name, with_protocol
from rsd_trt.errors import UserError
from rsd_trt.eval.results import Episode, EpisodeLog, Json, summarise, write_atomically
from rsd_trt.eval.rollout import check_video_writer, run_episode, write_video
from rsd_trt.eval.simulator import Simulator, check_task, initial_states, open_suite
from rsd_trt.jsonio import to_json
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
    record_hidden: Path | None = None  # `shadow` only


def evaluate(
    request: EvalRequest,
    on_start: Callable[[int, list[Episode]], None],
    on_episode: Callable[[Episode], None],
    command: str,
) -> Json:
    """Runs the episodes that the run in `request.out` still lacks, and writes its results file.

    `on_start` is told the number of episodes in all and those that are there already.

    Raises:
        UserError: anything in the request that cannot be done here, or a folder that cannot be written.
    """
    try:
        return _evaluate(request, on_start, on_episode, command)
    except OSError as error:
        raise UserError(f"{error.filename or request.out}: {error.strerror or error}") from None


def _evaluate(
    request: EvalRequest,
    on_start: Callable[[int, list[Episode]], None],
    on_episode: Callable[[Episode], None],
    command: str,
) -> Json:
    bundle = Bundle.open(request.bundle)
    control = bundle.config.control
    if request.protocol is not None:
        control = with_protocol(control, request.protocol)
    tasks = _tasks(request)
    max_steps = request.max_steps or control.max_steps.get(request.suite)
    if max_steps is None:
        raise UserError(f"the bundle's control.max_steps has no {request.suite}; give --max-steps")
    if request.video:
        check_video_writer()
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
    name = f"{request.suite}_{request.mode}"
    results_file = request.out / f"{name}_results.json"
    log = EpisodeLog(
        request.out / f"{name}_episodes.jsonl",
        _settings(request, bundle, policy, list(tasks), max_steps, device),
        request.fresh,
    )
    if request.fresh:
        results_file.unlink(missing_ok=True)
    if request.record_hidden is not None:
        if log.episodes:
            raise UserError(f"{log.path} has episodes whose hidden states are gone. To record them all: --fresh")
        request.record_hidden.parent.mkdir(parents=True, exist_ok=True)
        policy.hidden_states = []
    missing = {task: [trial for trial in range(request.trials) if log.lacks(task, trial)] for task in tasks}
    on_start(len(tasks) * request.trials, [e for e in log.episodes.values() if e.error is None])
    for task, trials in missing.items():
        if not trials:
            continue
        with closing(Simulator(request.suite, task, control)) as simulator:
            for trial in trials:
                frames: list[NDArray[np.uint8]] | None = [] if request.video else None
                episode = run_episode(policy, simulator, task, trial, max_steps, frames)
                log.append(episode)
                on_episode(episode)
                if frames:
                    outcome = "error" if episode.error else "success" if episode.success else "failure"
                    write_video(request.out / "videos" / name / f"task{task}_trial{trial}_{outcome}.mp4", frames)
    summary = summarise(log.settings, list(log.episodes.values()), tasks, bundle.config.dims)
    summary |= {"command": command, "results_file": str(results_file)}
    write_atomically(results_file, json.dumps(summary, indent=1) + "\n")
    if request.record_hidden is not None:
        _write_hidden(request.record_hidden, policy)
    return summary


def _settings(
    request: EvalRequest, bundle: Bundle, policy: Policy, tasks: list[int], max_steps: int, device: str
) -> Json:
    """All that a result depends on. A run resumes, and runs are compared, only where it is the same."""
    return {
        "suite": request.suite,
        "tasks": tasks,
        "trials": request.trials,
        "mode": request.mode,
        "backend": request.backend,
        "precision": request.precision,
        "backbone": "eager",
        "device": device,
        "protocol": protocol_name(bundle.config.control),
        "max_steps": max_steps,
        "n_action_steps": policy.n_action_steps,
        "seed": request.seed,
        "bundle": bundle.config.name,
        "bundle_sha256": bundle.fingerprint,
        "exports_sha256": policy.exports,
        "trained": bundle.config.trained,
        "rsd": to_json(bundle.config.rsd),
        "control": to_json(bundle.config.control),
        "hardware": host.hardware(device),
        "versions": host.versions(),
    }


def _write_hidden(path: Path, policy: Policy) -> None:
    """The recorded hidden states, as `rsd-trt verify` reads them: `prefix` and `final`, each [n, H] float32."""
    from safetensors.torch import save

    assert policy.hidden_states
    prefix, final = (torch.cat(states).float() for states in zip(*policy.hidden_states, strict=True))
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(save({"prefix": prefix, "final": final}))
    temporary.replace(path)


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
