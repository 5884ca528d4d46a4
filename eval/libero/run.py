"""An evaluation from request to results file."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.driver import Driver, bundle_driver, scripted_driver
from rsd_trt.eval.libero.episode import Assignment, check_video_writer, serve
from rsd_trt.eval.libero.episode_log import EpisodeLog
from rsd_trt.eval.libero.perturb import check_target, draw
from rsd_trt.eval.libero.pool import Meter, run_episodes
from rsd_trt.eval.libero.request import EvalRequest, Scripted
from rsd_trt.eval.libero.simulator import Simulator, check_task, initial_states, open_suite
from rsd_trt.eval.results import Episode, Results, Throughput
from rsd_trt.eval.summary import summarise
from rsd_trt.files import locked, write_atomically
from rsd_trt.host import GpuMeter
from rsd_trt.jsonio import to_json
from rsd_trt.runtime.policy import Policy


def evaluate(
    request: EvalRequest,
    on_start: Callable[[int, list[Episode]], None],
    on_episode: Callable[[Episode], None],
    command: str,
) -> Results:
    """Runs the episodes that the run in `request.out` still lacks, and writes its results file.

    `on_start` is told the number of episodes in all and those that are there already.

    Raises:
        UserError: anything in the request that cannot be done here, a folder that cannot be written, or the user
            stopped the run: what had finished is kept, and the same request goes on from there.
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
) -> Results:
    if request.perturb is not None:
        check_target(request.suite)
    acting = request.policy if isinstance(request.policy, Scripted) else Bundle.open(request.policy)
    tasks = _tasks(request)
    if request.video:
        check_video_writer()
    _seed_everything(request.seed)
    if isinstance(acting, Scripted):
        driver = scripted_driver(request, acting, tuple(tasks))
    else:
        driver = bundle_driver(request, acting, tuple(tasks))
    policy, settings = driver.policy, driver.settings
    request.out.mkdir(parents=True, exist_ok=True)
    with locked(request.out / f".{request.name}.lock", partial(_refuse_to_share, request)):
        log = EpisodeLog(request.out, request.name, settings, request.fresh)
        if policy is not None and request.record_hidden is not None:
            if log.episodes:
                raise UserError(f"{log.path} has episodes whose hidden states are gone. To record them all: --fresh")
            policy.hidden_states = []
        if request.fresh:
            _remove_earlier(request)
        throughput = _run(request, driver, log, on_start, on_episode)
        episodes = list(log.episodes.values())
        results = summarise(settings, episodes, tasks, driver.codec_round_trip_mse, command, throughput)
        write_atomically(request.results_file, json.dumps(to_json(results), indent=1) + "\n")
        if policy is not None and request.record_hidden is not None:
            _write_hidden(request.record_hidden, policy)
        return results


def _run(
    request: EvalRequest,
    driver: Driver,
    log: EpisodeLog,
    on_start: Callable[[int, list[Episode]], None],
    on_episode: Callable[[Episode], None],
) -> Throughput | None:
    """Runs what the log lacks; how fast that was, if it was the whole run."""
    settings = log.settings
    keys = [(task, trial) for task in settings.tasks for trial in range(settings.trials)]
    earlier = [episode for episode in log.episodes.values() if episode.error is None]
    on_start(len(keys), list(earlier))
    videos = request.pictures("videos") if request.video else None
    failures = request.pictures("failures") if driver.script is None else None  # a script sees no images to keep
    perturbations = {key: draw(settings.perturb, *key) for key in keys} if settings.perturb is not None else {}
    missing = sorted((key for key in keys if log.lacks(*key)), key=lambda key: key in log.episodes)  # errors last
    assignments = [Assignment(*key, settings.max_steps, failures, videos, perturbations.get(key)) for key in missing]
    process = partial(serve, build=partial(Simulator, settings.suite, control=settings.control), script=driver.script)
    meter, gpu, started = Meter(), GpuMeter(torch.device(settings.device)), time.perf_counter()
    running = run_episodes(driver.policy, process, assignments, request.workers, driver.rows, request.timeout, meter)
    try:
        with gpu, closing(running) as episodes:
            for episode in episodes:
                log.append(episode)
                on_episode(episode)
            seconds = time.perf_counter() - started
    except KeyboardInterrupt:
        whole = sum(episode.error is None for episode in log.episodes.values())
        raise UserError(
            f"stopped with {whole} of {len(keys)} episodes in {log.path}; the same command goes on from there"
        ) from None
    if earlier or not assignments:
        return None
    share = meter.seconds / seconds
    return Throughput(
        workers=request.workers,
        wall_seconds=round(seconds, 3),
        episodes_per_second=len(assignments) / seconds,
        policy_share=share,
        rows_per_forward=meter.rows / meter.forwards if meter.forwards else 0.0,
        bound="policy" if share > 0.5 else "simulator",
        gpu_utilisation=gpu.mean,
    )


def _refuse_to_share(request: EvalRequest) -> None:
    raise UserError(f"another evaluation writes {request.out / request.name}_*. Wait for it, or choose another --out")


def _remove_earlier(request: EvalRequest) -> None:
    """What an earlier run left beside its episodes."""
    request.results_file.unlink(missing_ok=True)
    for kind in ("failures", "videos"):
        shutil.rmtree(request.pictures(kind), ignore_errors=True)


def _write_hidden(path: Path, policy: Policy) -> None:
    """The recorded hidden states, as `rsd-trt verify` reads them: `prefix` and `final`, each [n, H] float32."""
    from safetensors.torch import save

    if not policy.hidden_states:
        raise UserError(f"no query was answered, so there are no hidden states to write to {path}")
    prefix, final = (torch.cat(states).float() for states in zip(*policy.hidden_states, strict=True))
    write_atomically(path, save({"prefix": prefix, "final": final}))


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
