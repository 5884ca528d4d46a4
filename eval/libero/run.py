"""An evaluation from request to results file."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from msgspec import structs

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.driver import Driver, bundle_driver, script_driver
from rsd_trt.eval.libero.episode import Assignment, check_video_writer, serve
from rsd_trt.eval.libero.episode_log import EpisodeLog
from rsd_trt.eval.libero.pool import Meter, run_episodes
from rsd_trt.eval.libero.request import EvalRequest, Script
from rsd_trt.eval.libero.simulator import Simulator, check_task, initial_states, open_suite
from rsd_trt.eval.results import Episode, Results, Throughput
from rsd_trt.eval.summary import summarise
from rsd_trt.files import locked, write_atomically
from rsd_trt.host import GpuMeter
from rsd_trt.records import write_record
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
    with _explaining_files(request):
        driver, instructions = _prepare(request)
        total = len(instructions) * request.trials
        with _own_folder(request):
            log = _open_log(request, driver)
            earlier = [episode for episode in log.episodes.values() if episode.error is None]
            assignments = _assignments(request, driver, log)
            _warm_up(driver, instructions, assignments)
            on_start(total, list(earlier))
            meter, gpu, started = Meter(), GpuMeter(torch.device(driver.settings.device)), time.perf_counter()
            build = partial(Simulator, request.suite, control=driver.settings.control)
            process = partial(serve, build=build, script=driver.script)
            running = run_episodes(
                driver.policy, process, assignments, request.workers, driver.batch, request.timeout, meter
            )
            try:
                with gpu, closing(running) as episodes:
                    for episode in episodes:
                        log.append(episode)
                        on_episode(episode)
            except KeyboardInterrupt:
                whole = sum(episode.error is None for episode in log.episodes.values())
                raise UserError(
                    f"stopped with {whole} of {total} episodes in {log.path}",
                    "The same command goes on from there",
                ) from None
            seconds, count = time.perf_counter() - started, len(assignments)
            whole_run = count and not earlier
            throughput = _throughput(request.workers, count, seconds, meter, gpu) if whole_run else None
            finished = list(log.episodes.values())
            results = summarise(
                driver.settings, finished, instructions, driver.codec_round_trip_mse, command, throughput
            )
            write_record(request.results_file, results)
            if driver.policy is not None and request.record_hidden is not None:
                _write_hidden(request.record_hidden, driver.policy)
            return results


def _prepare(request: EvalRequest) -> tuple[Driver, dict[int, str]]:
    """What acts, ready to do so, and the instruction of every task."""
    acting = Bundle.open(request.bundle) if request.policy is None else Script.find(request.policy)
    instructions, suite_sha256 = _tasks(request)
    if request.perturb is not None:
        request.perturb.check(request.suite, list(instructions))
    if request.video:
        check_video_writer()
    _seed_everything(request.seed)
    if isinstance(acting, Script):
        driver = script_driver(request, acting, tuple(instructions))
    else:
        driver = bundle_driver(request, acting, tuple(instructions))
    settings = structs.replace(driver.settings, suite_sha256=suite_sha256)
    return replace(driver, settings=settings), instructions


@contextmanager
def _explaining_files(request: EvalRequest) -> Iterator[None]:
    """Raises UserError where a file or folder cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or request.out}: {error.strerror or error}") from None


@contextmanager
def _own_folder(request: EvalRequest) -> Iterator[None]:
    """The folder for results, which no other run of that name writes meanwhile.

    Raises:
        UserError: another one does.
    """

    def refuse() -> None:
        raise UserError(
            f"another evaluation writes {request.out / request.name}_*", "Wait for it, or choose another --out"
        )

    if request.out.exists() and not request.out.is_dir():
        raise UserError(f"--out {request.out} is a file, and results go into a folder")
    request.out.mkdir(parents=True, exist_ok=True)
    with locked(request.out / f".{request.name}.lock", refuse):
        yield


def _open_log(request: EvalRequest, driver: Driver) -> EpisodeLog:
    """The run's episodes so far; a fresh run leaves nothing of an earlier one."""
    log = EpisodeLog(request.out, request.name, driver.settings, request.fresh)
    if driver.policy is not None and request.record_hidden is not None:
        if log.episodes:
            raise UserError(f"{log.path} has episodes whose hidden states are gone", "To record them all: --fresh")
        driver.policy.hidden_states = []
    if request.fresh:
        request.results_file.unlink(missing_ok=True)
        for kind in ("failures", "videos"):
            shutil.rmtree(request.pictures(kind), ignore_errors=True)
    return log


def _assignments(request: EvalRequest, driver: Driver, log: EpisodeLog) -> list[Assignment]:
    """The episodes that the log lacks; those that ended in an error come last."""
    settings = driver.settings
    keys = [(task, trial) for task in settings.tasks for trial in range(settings.trials)]
    missing = sorted((key for key in keys if log.lacks(*key)), key=lambda key: key in log.episodes)
    videos = request.pictures("videos") if request.video else None
    failures = request.pictures("failures") if driver.script is None else None  # a script sees no images to keep
    perturbations = {key: request.perturb.draw(*key) for key in keys} if request.perturb is not None else {}
    return [Assignment(*key, settings.max_steps, failures, videos, perturbations.get(key)) for key in missing]


def _warm_up(driver: Driver, instructions: dict[int, str], assignments: Sequence[Assignment]) -> None:
    """Prepares the policy for what it will be asked, so that no query of an episode has to."""
    tasks = dict.fromkeys(assignment.task for assignment in assignments)
    for instruction in dict.fromkeys(instructions[task] for task in tasks):
        if driver.policy is not None:
            driver.policy.warm_up(instruction)


def _throughput(workers: int, episodes: int, seconds: float, meter: Meter, gpu: GpuMeter) -> Throughput:
    share = meter.seconds / seconds
    return Throughput(
        workers=workers,
        wall_seconds=round(seconds, 3),
        episodes_per_second=episodes / seconds,
        policy_share=share,
        rows_per_forward=meter.queries / meter.forwards if meter.forwards else 0.0,
        bound="policy" if share > 0.5 else "simulator",
        gpu_utilisation=gpu.mean,
    )


def _write_hidden(path: Path, policy: Policy) -> None:
    """The recorded hidden states, as `rsd-trt verify` reads them: `hidden`, [n, H] float32."""
    from safetensors.torch import save

    if not policy.hidden_states:
        raise UserError(f"no query was answered, so there are no hidden states to write to {path}")
    write_atomically(path, save({"hidden": torch.cat(policy.hidden_states).float()}))


def _tasks(request: EvalRequest) -> tuple[dict[int, str], str]:
    """The instruction of every task of the request, and the sha256 of their files and initial states: another benchmark
    may go by the same name.

    Raises:
        UserError: a suite, task or trial that LIBERO does not have, or LIBERO cannot be used here.
    """
    benchmark = open_suite(request.suite)
    tasks = request.tasks if request.tasks is not None else tuple(range(benchmark.n_tasks))
    digest = hashlib.sha256()
    for task in tasks:
        check_task(benchmark, request.suite, task)
        states = initial_states(benchmark, task)
        digest.update(Path(benchmark.get_task_bddl_file_path(task)).read_bytes())
        digest.update(states.tobytes())
        available = len(states)
        if request.trials > available:
            raise UserError(
                f"{request.suite} has {available} initial states for task {task}, not {request.trials}: "
                f"--trials {available}"
            )
    return {task: str(benchmark.get_task(task).language) for task in tasks}, digest.hexdigest()


def _seed_everything(seed: int) -> None:
    """Seeds every generator, as OpenVLA-OFT's evaluation does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
