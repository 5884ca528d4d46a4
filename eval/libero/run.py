"""An evaluation from request to results file."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
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
from rsd_trt.eval.libero.simulator import Simulator, check_task, initial_states, instruction, open_suite, task_file
from rsd_trt.eval.results import Episode, Results, Throughput
from rsd_trt.eval.summary import summarise
from rsd_trt.files import locked, write_atomically
from rsd_trt.host import GpuMeter
from rsd_trt.load import LoadMeter
from rsd_trt.records import write_record
from rsd_trt.runtime.policy import Policy


@dataclass(frozen=True)
class Run:
    """A request under way."""

    request: EvalRequest
    driver: Driver
    log: EpisodeLog
    assignments: tuple[Assignment, ...]  # that its log lacks
    earlier: tuple[Episode, ...]  # that its log has


def evaluate(
    request: EvalRequest,
    on_start: Callable[[int, list[Episode]], None],
    on_episode: Callable[[Episode], None],
    command: str,
) -> Results:
    """`evaluate_together` of one request."""
    return evaluate_together([request], on_start, on_episode, command)[0]


def evaluate_together(
    requests: Sequence[EvalRequest],
    on_start: Callable[[int, list[Episode]], None],
    on_episode: Callable[[Episode], None],
    command: str,
) -> list[Results]:
    """Runs the episodes that the requests' runs still lack, and writes a results file for each.

    The requests differ in mode alone. Their runs share the loaded model and take turns, episode by episode, so that a
    machine that drifts drifts for all. `on_start` is told the number of episodes in all and those that are there.

    Raises:
        UserError: anything in a request that cannot be done here, a folder that cannot be written, or the user
            stopped the run: what had finished is kept, and the same requests go on from there.
    """
    with ExitStack() as stack:
        stack.enter_context(_explaining_files(requests[0]))
        drivers, instructions = _prepare(requests)
        for request in requests:
            stack.enter_context(_own_folder(request))
        begun = [_begun(*pair) for pair in zip(requests, drivers, strict=True)]
        runs = {run.driver.settings.run: run for run in begun}
        total = len(instructions) * sum(request.trials for request in requests)
        assignments = _in_turn(list(runs.values()))
        _warm_up(drivers[0], instructions, assignments)
        on_start(total, [episode for run in runs.values() for episode in run.earlier])
        meter, gpu = Meter(), GpuMeter(torch.device(drivers[0].settings.device))
        started = time.perf_counter()
        try:
            with gpu, closing(_running(requests[0], drivers, assignments, meter)) as episodes:
                load = LoadMeter()
                for episode in episodes:
                    episode = structs.replace(episode, others=load.lap())
                    runs[episode.run].log.append(episode)
                    on_episode(episode)
        except KeyboardInterrupt:
            whole = sum(episode.error is None for run in runs.values() for episode in run.log.episodes.values())
            raise UserError(
                f"stopped with {whole} of {total} episodes in {' and '.join(str(r.log.path) for r in runs.values())}",
                "The same command goes on from there",
            ) from None
        seconds, count = time.perf_counter() - started, len(assignments)
        whole_run = count and len(runs) == 1 and not any(run.earlier for run in runs.values())
        throughput = _throughput(requests[0].workers, count, seconds, meter, gpu) if whole_run else None
        return [_finished(run, instructions, command, throughput) for run in runs.values()]


def _prepare(requests: Sequence[EvalRequest]) -> tuple[list[Driver], dict[int, str]]:
    """What acts in each run, ready to do so, and the instruction of every task."""
    request = requests[0]
    acting = Bundle.open(request.bundle) if request.policy is None else Script.find(request.policy)
    instructions, suite_sha256 = _tasks(request)
    if request.perturb is not None:
        request.perturb.check(request.suite, list(instructions))
    if request.video:
        check_video_writer()
    _seed_everything(request.seed)
    drivers: list[Driver] = []
    for one in requests:
        if isinstance(acting, Script):
            driver = script_driver(one, acting, tuple(instructions))
        else:
            driver = bundle_driver(one, acting, tuple(instructions), drivers[0].policy if drivers else None)
        drivers.append(replace(driver, settings=structs.replace(driver.settings, suite_sha256=suite_sha256)))
    return drivers, instructions


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


def _begun(request: EvalRequest, driver: Driver) -> Run:
    """A run with its log, and what that lacks."""
    log = _open_log(request, driver)
    earlier = tuple(episode for episode in log.episodes.values() if episode.error is None)
    return Run(request, driver, log, tuple(_assignments(request, driver, log)), earlier)


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
    drawn = {key: request.perturb.draw(*key) for key in keys} if request.perturb is not None else {}
    steps, run = settings.max_steps, settings.run
    return [Assignment(*key, steps, failures, videos, drawn.get(key), run) for key in missing]


def _in_turn(runs: Sequence[Run]) -> list[Assignment]:
    """The assignments of all runs: each trial in one run after the other, and the next trial the other way round."""
    if len(runs) == 1:
        return list(runs[0].assignments)
    places = [(a.task, a.trial, -i if a.trial % 2 else i, a) for i, run in enumerate(runs) for a in run.assignments]
    return [place[-1] for place in sorted(places, key=lambda place: place[:3])]


def _running(
    request: EvalRequest, drivers: Sequence[Driver], assignments: Sequence[Assignment], meter: Meter
) -> Generator[Episode, None, None]:
    first = drivers[0]
    process = partial(
        serve, build=partial(Simulator, request.suite, control=first.settings.control), script=first.script
    )
    beside = {driver.settings.run: driver.policy for driver in drivers[1:] if driver.policy is not None}
    workers, batch, timeout = request.workers, first.batch, request.timeout
    return run_episodes(first.policy, process, assignments, workers, batch, timeout, meter, beside=beside)


def _finished(run: Run, instructions: dict[int, str], command: str, throughput: Throughput | None) -> Results:
    """The run's results, written."""
    request, driver = run.request, run.driver
    episodes = list(run.log.episodes.values())
    results = summarise(driver.settings, episodes, instructions, driver.codec_round_trip_mse, command, throughput)
    write_record(request.results_file, results)
    if driver.policy is not None and request.record_hidden is not None:
        _write_hidden(request.record_hidden, driver.policy)
    return results


def _warm_up(driver: Driver, instructions: dict[int, str], assignments: Sequence[Assignment]) -> None:
    """Prepares the policy for what it will be asked, so that no query of an episode has to."""
    tasks = dict.fromkeys(assignment.task for assignment in assignments)
    for told in dict.fromkeys(instructions[task] for task in tasks):
        if driver.policy is not None:
            driver.policy.warm_up(told)


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
        digest.update(task_file(benchmark, task).read_bytes())
        digest.update(states.tobytes())
        available = len(states)
        if not available:
            others = ",".join(str(other) for other in range(benchmark.n_tasks) if len(initial_states(benchmark, other)))
            raise UserError(f"{request.suite} has no initial states for task {task}", f"Leave it out: --tasks {others}")
        if request.trials > available:
            raise UserError(
                f"{request.suite} has {available} initial states for task {task}, not {request.trials}: "
                f"--trials {available}"
            )
    return {task: instruction(benchmark, request.suite, task) for task in tasks}, digest.hexdigest()


def _seed_everything(seed: int) -> None:
    """Seeds every generator, as OpenVLA-OFT's evaluation does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
