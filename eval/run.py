"""An evaluation from request to results file."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import DEFAULT_ENGINES, Mode, Precision, protocol_name, with_protocol
from rsd_trt.errors import UserError
from rsd_trt.eval.episode_log import EpisodeLog
from rsd_trt.eval.pool import Meter, run_episodes
from rsd_trt.eval.results import Episode, Results, Settings, Throughput
from rsd_trt.eval.rollout import Assignment, check_video_writer
from rsd_trt.eval.simulator import Simulator, check_task, initial_states, open_suite
from rsd_trt.eval.summary import summarise
from rsd_trt.files import locked, write_atomically
from rsd_trt.host import GpuMeter
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
    workers: int = 1  # simulator processes; with one, each query is answered alone
    timeout: float = 300.0  # s of a simulator's silence after which its process is replaced

    @property
    def name(self) -> str:
        """What the names of the run's files start with."""
        return f"{self.suite}_{self.mode}"

    @property
    def results_file(self) -> Path:
        return self.out / f"{self.name}_results.json"

    def pictures(self, kind: str) -> Path:
        """The run's folder for `failures` or `videos`."""
        return self.out / kind / self.name


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
    device = check_device(request.device)
    _seed_everything(request.seed)
    bundle = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, control=control))
    rows = request.workers if device.type == "cuda" else 1  # the CPU gains nothing: see `rsd_trt.eval.pool`
    policy = Policy.load(
        bundle,
        request.mode,
        request.backend,
        str(device),
        request.n_action_steps,
        slots=request.workers,
        rows=rows,
        precision=request.precision,
        engines=request.engines,
    )
    settings = _settings(request, bundle, policy, tuple(tasks), max_steps, str(device))
    request.out.mkdir(parents=True, exist_ok=True)
    with locked(request.out / f".{request.name}.lock", partial(_refuse_to_share, request)):
        log = EpisodeLog(request.out, request.name, settings, request.fresh)
        if request.record_hidden is not None:
            if log.episodes:
                raise UserError(f"{log.path} has episodes whose hidden states are gone. To record them all: --fresh")
            policy.hidden_states = []
        if request.fresh:
            _remove_earlier(request)
        throughput = _run(request, policy, log, rows, on_start, on_episode)
        mse = bundle.codec().round_trip_error()
        results = summarise(settings, list(log.episodes.values()), tasks, mse, command, throughput)
        write_atomically(request.results_file, json.dumps(to_json(results), indent=1) + "\n")
        if request.record_hidden is not None:
            _write_hidden(request.record_hidden, policy)
        return results


def _run(
    request: EvalRequest,
    policy: Policy,
    log: EpisodeLog,
    rows: int,
    on_start: Callable[[int, list[Episode]], None],
    on_episode: Callable[[Episode], None],
) -> Throughput | None:
    """Runs what the log lacks; how fast that was, if it was the whole run."""
    settings = log.settings
    keys = [(task, trial) for task in settings.tasks for trial in range(settings.trials)]
    earlier = [episode for episode in log.episodes.values() if episode.error is None]
    on_start(len(keys), list(earlier))
    videos = request.pictures("videos") if request.video else None
    missing = sorted((key for key in keys if log.lacks(*key)), key=lambda key: key in log.episodes)  # errors last
    assignments = [Assignment(*key, settings.max_steps, request.pictures("failures"), videos) for key in missing]
    build = partial(Simulator, settings.suite, control=settings.control)
    meter, gpu, started = Meter(), GpuMeter(torch.device(settings.device)), time.perf_counter()
    try:
        with (
            gpu,
            closing(
                run_episodes(policy, build, assignments, request.workers, rows, request.timeout, meter)
            ) as episodes,
        ):
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


def _settings(
    request: EvalRequest, bundle: Bundle, policy: Policy, tasks: tuple[int, ...], max_steps: int, device: str
) -> Settings:
    config = bundle.config
    return Settings(
        suite=request.suite,
        tasks=tasks,
        trials=request.trials,
        mode=request.mode,
        timing="single" if request.workers == 1 else "batched",
        backend=request.backend,
        precision=request.precision,
        backbone="eager",
        device=device,
        protocol=protocol_name(config.control),
        max_steps=max_steps,
        n_action_steps=policy.n_action_steps,
        seed=request.seed,
        bundle=config.name,
        bundle_sha256=bundle.fingerprint,
        exports_sha256=policy.exports,
        trained=config.trained,
        backbone_blocks=config.backbone.language.blocks,
        levels=config.dims.K,
        rsd=config.rsd,
        control=config.control,
        training_actions=config.training_actions,
        hardware=dict(host.hardware(device)),
        versions=host.versions(),
    )


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
