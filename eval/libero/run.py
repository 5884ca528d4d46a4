"""An evaluation from request to results file: episodes of a request, executed here and streamed to a log."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from msgspec import structs

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.driver import Driver, bundle_driver, model_key, script_driver
from rsd_trt.eval.libero.episode import Assignment, serve
from rsd_trt.eval.libero.episode_log import EpisodeLog
from rsd_trt.eval.libero.film import check_video_writer, write_beside
from rsd_trt.eval.libero.pool import Meter, Pool
from rsd_trt.eval.libero.rendering import gpu_number
from rsd_trt.eval.libero.request import EvalRequest, Script
from rsd_trt.eval.libero.simulator import Simulator, check_task, initial_states, instruction, open_suite, task_file
from rsd_trt.eval.libero.worker import recorded_name
from rsd_trt.eval.results import Episode, EpisodeKey, Results, Settings, Throughput
from rsd_trt.eval.summary import summarise
from rsd_trt.files import check_folder, explained, locked, write_atomically
from rsd_trt.host import GpuMeter
from rsd_trt.load import LoadMeter
from rsd_trt.recorder import Recorder
from rsd_trt.recordings import Facts
from rsd_trt.records import to_text, write_record
from rsd_trt.runtime.policy import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A request that can be executed, and what its results will say of it."""

    settings: Settings
    instructions: dict[int, str]  # by task
    codec_round_trip_mse: float | None = None


class Executor:
    """Executes episodes of requests on this machine. What those share that come after one another is kept: the model
    that is loaded, and the simulators' processes with the environments that they have built."""

    def __init__(self) -> None:
        self._open: list[tuple[EvalRequest, Driver]] = []
        self._loaded: Policy | None = None
        self._model: tuple[object, ...] = ()  # the key of what is loaded
        self._warm: set[str] = set()  # instructions that it was prepared for
        self._pool: Pool | None = None
        self._processes: tuple[object, ...] = ()  # the key of the pool

    def open(self, requests: Sequence[EvalRequest]) -> list[Job]:
        """Makes what acts in each request ready to do so. They have one `group_key`.

        Raises:
            UserError: anything in a request that cannot be done here.
        """
        request = requests[0]
        acting = Bundle.open(request.bundle) if request.policy is None else Script.find(request.policy)
        scenes = [_tasks(one) for one in requests]
        for one, (instructions, _) in zip(requests, scenes, strict=True):
            if one.perturb is not None:
                one.perturb.check(one.suite, list(instructions))
        if request.video:
            check_video_writer()
        _seed_everything(request.seed)
        key = () if isinstance(acting, Script) else (acting.fingerprint, *model_key(request))
        self._open = []
        if key != self._model:  # the memory of the old one is wanted for the new one
            self._loaded, self._model, self._warm = None, key, set()
        jobs = []
        for one, (instructions, suite_sha256) in zip(requests, scenes, strict=True):
            if isinstance(acting, Script):
                driver = script_driver(one, acting, tuple(instructions))
            else:
                driver = bundle_driver(one, acting, tuple(instructions), self._loaded)
                self._loaded = self._loaded or driver.policy
            settings = structs.replace(driver.settings, suite_sha256=suite_sha256)
            jobs.append(Job(settings, instructions, driver.codec_round_trip_mse))
            self._open.append((one, replace(driver, settings=settings)))
        return jobs

    def policies(self) -> list[Policy | None]:
        """What acts in each of the requests that are open; None: a script."""
        return [driver.policy for _, driver in self._open]

    def run(
        self,
        jobs: Sequence[Job],
        keys: Sequence[Sequence[EpisodeKey]],
        meter: Meter,
        pictures: bool = True,
        recorder: Recorder | None = None,
    ) -> Generator[Episode, None, None]:
        """Executes episodes of the requests that were opened last, as the `jobs`: gives each as it finishes.

        keys: the episodes of each request. pictures: whether strips, and the videos that the requests ask for, are
        kept. recorder: keeps what queries see and say, where it is wanted.

        Raises:
            UserError: as `rsd_trt.eval.libero.pool.Pool.run`.
        """
        request, first = self._open[0]
        wanted = [job.instructions[task] for job, mine in zip(jobs, keys, strict=True) for task, _ in mine]
        for told in dict.fromkeys(wanted):
            if first.policy is not None and told not in self._warm:
                first.policy.warm_up(told)  # so that no query of an episode has to
                self._warm.add(told)
        opened = zip(self._open, keys, strict=True)
        assignments = _in_turn([_assignments(*pair, mine, pictures) for pair, mine in opened], request.workers)
        beside = {driver.settings.run: driver.policy for _, driver in self._open[1:] if driver.policy is not None}
        pool = self._pool_of(request, first)
        return pool.run(first.policy, assignments, first.batch, meter, beside=beside, recorder=recorder)

    def close(self) -> None:
        """Ends the simulators' processes and lets go of the model."""
        if self._pool is not None:
            self._pool.close()
        self.__init__()  # type: ignore[misc]

    def _pool_of(self, request: EvalRequest, driver: Driver) -> Pool:
        control, script, gpu = driver.settings.control, driver.script, gpu_number(driver.settings.device)
        key = (request.suite, to_text(control), script, gpu, request.workers, request.timeout)
        if self._pool is None or key != self._processes:
            if self._pool is not None:
                self._pool.close()
            process = partial(serve, build=partial(Simulator, request.suite, control=control, gpu=gpu), script=script)
            self._pool, self._processes = Pool(process, request.workers, request.timeout), key
        return self._pool


@dataclass(frozen=True)
class Run:
    """A request under way."""

    request: EvalRequest
    job: Job
    log: EpisodeLog
    missing: tuple[EpisodeKey, ...]  # that its log lacks
    earlier: frozenset[EpisodeKey]  # that its log has, without an error

    @classmethod
    def begin(cls, request: EvalRequest, job: Job, policy: Policy | None = None) -> Run:
        """A run with its log; a fresh one leaves nothing of an earlier one. policy: that records hidden states, where
        they are asked for."""
        log = EpisodeLog(request.out, request.name, job.settings, request.fresh)
        if policy is not None and request.record_hidden is not None:
            if log.done:
                raise UserError(f"{log.path} has episodes whose hidden states are gone", "To record them all: --fresh")
            policy.hidden_states = []
        if request.fresh:
            request.results_file.unlink(missing_ok=True)
            for kind in ("strips", "videos"):
                shutil.rmtree(request.pictures(kind), ignore_errors=True)
        return cls(request, job, log, tuple(log.missing()), frozenset(log.done))

    def finish(self, command: str, throughput: Throughput | None) -> Results:
        """The results of what the log has, written."""
        told, mse = self.job.instructions, self.job.codec_round_trip_mse
        results = summarise(self.job.settings, self.log.read(), told, mse, command, throughput)
        write_record(self.request.results_file, results)
        return results


def evaluate_together(
    requests: Sequence[EvalRequest],
    on_start: Callable[[int, Iterable[Episode]], None],
    on_episode: Callable[[EvalRequest, Episode], None],
    command: str,
    executor: Executor | None = None,
) -> list[Results]:
    """Runs the episodes that the requests' runs still lack, and writes a results file for each.

    The requests have one `group_key`. Their runs share the loaded model and the simulators. With one worker they take
    turns, episode by episode, so that a machine that drifts drifts for all; with more, task by task. `on_start` is told
    the number of episodes in all and those that are there. executor: one that other calls share; by default one of its
    own.

    Raises:
        UserError: anything in a request that cannot be done here, a folder that cannot be written, or the user
            stopped the run: what had finished is kept, and the same requests go on from there.
    """
    with ExitStack() as stack:
        stack.enter_context(explained(requests[0].out))
        executor = executor or stack.enter_context(closing(Executor()))
        jobs = executor.open(requests)
        for request in requests:
            stack.enter_context(own_folder(request))
        recorder = _recorder(requests[0], jobs[0])
        begun = [Run.begin(*one) for one in zip(requests, jobs, executor.policies(), strict=True)]
        for run in begun:
            _check_recorded(run, recorder)
        runs = {run.job.settings.run: run for run in begun}
        total = sum(len(run.job.instructions) * run.request.trials for run in begun)
        device = jobs[0].settings.device
        meter = Meter(cores=len(os.sched_getaffinity(0)), gpus=int(device.startswith("cuda")))
        on_start(total, (episode for run in begun for episode in run.log.read() if episode.error is None))
        running = executor.run(jobs, [run.missing for run in begun], meter, recorder=recorder)
        try:
            with GpuMeter(torch.device(device)) as gpu, closing(running) as episodes:
                load = LoadMeter()
                for episode in episodes:
                    episode = structs.replace(episode, others=load.lap())
                    runs[episode.run].log.append(episode)
                    on_episode(runs[episode.run].request, episode)
        except KeyboardInterrupt:
            logs = [run.log for run in begun]
            place = " and ".join(str(log.path) for log in logs) if len(logs) < 3 else requests[0].out.parent
            raise UserError(
                f"stopped with {sum(len(log.done) for log in logs)} of {total} episodes in {place}",
                "The same command goes on from there",
            ) from None
        meter.utilisation, count = gpu.mean, sum(len(run.missing) for run in begun)
        whole = count and not any(run.earlier for run in begun)
        parts = [(requests[0].workers, meter)]
        throughput = throughput_of(count, len(begun), meter.wall, parts) if whole else None
        results = [run.finish(command, throughput) for run in begun]
        for request, policy in zip(requests, executor.policies(), strict=True):
            if policy is not None and request.record_hidden is not None:
                _write_hidden(request.record_hidden, policy)
        if len(requests) > 1 and requests[0].video:
            _write_beside(requests, sorted({episode.key for one in results for episode in one.episodes}))
        return results


@contextmanager
def own_folder(request: EvalRequest) -> Iterator[None]:
    """The folder for results, which no other run of that name writes meanwhile.

    Raises:
        UserError: another one does, or there can be no such folder.
    """

    def refuse() -> None:
        raise UserError(
            f"another evaluation writes {request.out / request.name}_*", "Wait for it, or choose another --out"
        )

    for folder in (request.out, *([request.record_hidden.parent] if request.record_hidden else [])):
        check_folder(folder)
    request.out.mkdir(parents=True, exist_ok=True)
    with locked(request.out / f".{request.name}.lock", refuse):
        yield


def _recorder(request: EvalRequest, job: Job) -> Recorder | None:
    """What keeps all that queries see and say, where that is wanted.

    Raises:
        UserError: the folder holds recordings of another bundle, or cannot be written.
    """
    if request.record is None:
        return None
    bundle = Bundle.open(request.bundle)
    acting = replace(bundle, config=structs.replace(bundle.config, control=job.settings.control))
    return Recorder(request.record, Facts.of(acting, request.record_size), request.record_limit)


def _check_recorded(run: Run, recorder: Recorder | None) -> None:
    """Raises UserError if episodes of the run so far were not recorded, for another reason than that there was no room,
    and the others are to be."""
    done = [recorded_name(run.job.settings.run, *key) for key in run.earlier]
    if recorder is not None and (lost := sum(not recorder.has(name) for name in done)):
        said = f"{run.log.path} has {lost} episodes that were not recorded"
        if not recorder.at_limit:
            raise UserError(said, "To record them all: --fresh")
        log.warning("%s: %s is at its limit of %g GB", said, recorder.folder, recorder.limit)


def _assignments(request: EvalRequest, driver: Driver, keys: Sequence[EpisodeKey], pictures: bool) -> list[Assignment]:
    videos = request.pictures("videos") if request.video and pictures else None
    seen = driver.script is None  # a script sees no images to keep
    strips = request.pictures("strips") if seen and pictures else None
    drawn = {key: request.perturb.draw(*key) for key in keys} if request.perturb is not None else {}
    steps, run = driver.settings.max_steps, driver.settings.run
    seeds = driver.settings.seeds
    return [Assignment(*key, steps, strips, videos, drawn.get(key), run, seeds) for key in keys]


def _in_turn(runs: Sequence[Sequence[Assignment]], workers: int) -> list[Assignment]:
    """The assignments of all runs. With one worker, whose clock counts: each trial in one run after the other, and the
    next trial the other way round. With more, one run after the other, which the pool deals out by task: queries of one
    run share a forward."""
    if workers > 1 or len(runs) == 1:
        return [assignment for run in runs for assignment in run]
    places = [(a.task, a.trial, -i if a.trial % 2 else i, a) for i, run in enumerate(runs) for a in run]
    return [place[-1] for place in sorted(places, key=lambda place: place[:3])]


def throughput_of(episodes: int, runs: int, seconds: float, parts: Sequence[tuple[int, Meter]]) -> Throughput:
    """How fast runs were that shared model and simulators, and took so many seconds together. parts: the simulator
    processes and the meter of each part of them that was executed in one go."""
    wall = sum(meter.wall for _, meter in parts)

    def mean(values: Iterable[float]) -> float:
        """By the parts' wall time."""
        return sum(value * meter.wall for value, (_, meter) in zip(values, parts, strict=True)) / wall

    share = sum(meter.seconds for _, meter in parts) / wall
    forwards = sum(meter.forwards for _, meter in parts)
    used = [meter.utilisation for _, meter in parts if meter.utilisation is not None]
    together = wall / seconds  # parts at a time
    return Throughput(
        runs=runs,
        workers=max(1, round(mean(workers for workers, _ in parts) * together)),
        wall_seconds=round(seconds, 3),
        episodes_per_second=episodes / seconds,
        policy_share=share,
        rows_per_forward=sum(meter.queries for _, meter in parts) / forwards if forwards else 0.0,
        bound="policy" if share > 0.5 else "simulator",
        gpu_utilisation=sum(used) / len(used) if used else None,
        cores=mean(meter.cores for _, meter in parts) * together,
        gpus=mean(meter.gpus for _, meter in parts) * together,
    )


def _write_beside(requests: Sequence[EvalRequest], keys: Sequence[EpisodeKey]) -> None:
    """For each initial state one video of what every mode makes of it."""
    for task, trial in keys:
        name = f"task{task}_trial{trial}"
        found = [sorted(request.pictures("videos").glob(f"{name}_*.mp4")) for request in requests]
        if all(found):
            write_beside(requests[0].out / "videos" / "beside" / f"{name}.mp4", [videos[-1] for videos in found])


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
    seeds = len(request.perturb.seeds) if request.perturb else 1
    for task in tasks:
        check_task(benchmark, request.suite, task)
        states = initial_states(benchmark, task)
        digest.update(task_file(benchmark, task).read_bytes())
        digest.update(states.tobytes())
        available = len(states)
        if not available:
            others = ",".join(str(other) for other in range(benchmark.n_tasks) if len(initial_states(benchmark, other)))
            raise UserError(f"{request.suite} has no initial states for task {task}", f"Leave it out: --tasks {others}")
        if request.trials > available * seeds:
            raise UserError(
                f"{request.suite} has {available} initial states for task {task}: {request.trials} trials are too many",
                f"Use: --trials {available * seeds}, or more seeds, as in --perturb late:7+8",
            )
    return {task: instruction(benchmark, request.suite, task) for task in tasks}, digest.hexdigest()


def _seed_everything(seed: int) -> None:
    """Seeds every generator, as OpenVLA-OFT's evaluation does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
