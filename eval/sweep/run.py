"""A sweep's runs, in groups that share a model and simulators, and what is known of them before and after."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.driver import (
    acceptance_rate,
    control_of,
    group_key,
    max_steps,
    script_control,
)
from rsd_trt.eval.libero.request import EvalRequest, Script, with_options
from rsd_trt.eval.libero.run import Executor, evaluate_together
from rsd_trt.eval.libero.simulator import open_suite
from rsd_trt.eval.read import read_run
from rsd_trt.eval.results import Episode, EpisodeKey, Settings
from rsd_trt.eval.sweep.plan import Run, Sweep


class Progress(Protocol):
    """Who follows a sweep."""

    def start(self, total: int, done: int, successes: int, /) -> None:
        """Episodes in all, and those that are there already."""
        ...

    def add(self, run: str, episode: Episode, /) -> None: ...
    def lost(self, message: str, /) -> None:
        """A worker or a node is gone, or a shard broke."""
        ...


class Line(msgspec.Struct, frozen=True):
    """A line of a run's log, in what an overview needs of it."""

    task_id: int
    trial: int
    success: bool
    seconds: float
    error: str | None = None


class _Outcome(msgspec.Struct, frozen=True):
    """A results file, in what an overview needs of it."""

    total_episodes: int
    errors: int
    settings: Settings


@dataclass(frozen=True)
class State:
    """A run as it is on the disk."""

    total: int  # episodes
    lines: dict[EpisodeKey, Line]  # those that ended without an error
    finished: bool  # all of them, and its results are written

    @property
    def missing(self) -> int:
        return self.total - len(self.lines)


def state_of(run: Run) -> State:
    """How far a run is. What is damaged counts as missing: who goes on with the run tells of it.

    Raises:
        UserError: its suite cannot be opened.
    """
    request = run.request
    tasks = request.tasks if request.tasks is not None else range(open_suite(request.suite).n_tasks)
    total = len(tasks) * request.trials
    log, lines = request.out / f"{request.name}_episodes.jsonl", {}
    whole = log.read_bytes() if log.is_file() else b""
    for text in whole[: whole.rfind(b"\n") + 1].splitlines():
        try:
            line = msgspec.json.decode(text, type=Line)
        except (ValueError, RecursionError):
            continue
        if line.error is None:
            lines[line.task_id, line.trial] = line
    return State(total, lines, _is_finished(run, total))


def _is_finished(run: Run, total: int) -> bool:
    """Whether the run's results are all there, of what the request asks for."""
    request = run.request
    try:
        found = msgspec.json.decode(request.results_file.read_bytes(), type=_Outcome)
    except (OSError, ValueError, RecursionError, UserError):
        return False
    settings = found.settings
    asked: dict[str, object] = {
        "suite": request.suite,
        "trials": request.trials,
        "seed": request.seed,
        "perturb": str(request.perturb) if request.perturb else None,
        "tasks": request.tasks,
        "device": None if request.device == "auto" else request.device,
    }
    always = ("suite", "trials", "seed", "perturb")
    if any(getattr(settings, name) != value for name, value in asked.items() if value is not None or name in always):
        return False
    return (found.total_episodes, found.errors) == (total, 0) and _is_of(request, settings)


def _is_of(request: EvalRequest, settings: Settings) -> bool:
    """Whether that acts which the request names."""
    if request.policy is not None:
        control = script_control(request)
        same = settings.policy_sha256 == Script.find(request.policy).sha256
        return same and (settings.control, settings.max_steps) == (control, max_steps(request, control))
    bundle, found = Bundle.open(request.bundle), settings.bundle
    control = control_of(request, bundle.config.control)
    rate = request.accept_rate
    return (
        found is not None
        and settings.policy_sha256 == bundle.fingerprint
        and (settings.control, settings.max_steps) == (control, max_steps(request, control))
        and found.rsd == with_options(bundle.config.rsd, request)
        and (found.mode, found.backend, found.precision) == (request.mode, request.backend, request.precision)
        and found.backbone_precision == request.backbone_precision
        and request.backbone in (None, found.backbone)
        and (rate is None or found.accept_rate == rate)
    )


def unfinished(sweep: Sweep, progress: Progress) -> list[Run]:
    """The runs that lack episodes or results. Tells how far the sweep is."""
    states = {run.name: state_of(run) for run in sweep.runs}
    lines = [line for state in states.values() for line in state.lines.values()]
    total = sum(state.total for state in states.values())
    progress.start(total, len(lines), sum(line.success for line in lines))
    return [run for run in sweep.runs if not states[run.name].finished]


def groups(runs: Sequence[Run]) -> list[tuple[Run, ...]]:
    """The runs in groups that can be executed together, in order: a run that takes over a rate comes in a later group
    than the one that has it."""
    found: dict[tuple[object, ...], list[Run]] = {}
    names = {run.name for run in runs}
    for run in runs:
        found.setdefault((run.matched in names, *group_key(run.request)), []).append(run)
    return [tuple(found[key]) for key in sorted(found, key=lambda key: bool(key[0]))]


def sweep_here(sweep: Sweep, progress: Progress, command: str) -> None:
    """Executes what the sweep lacks on this machine, a group of runs at a time, with one executor for all of them.

    Raises:
        UserError: as `evaluate_together`.
    """
    sweep.declare()
    with closing(Executor()) as executor:
        for group in groups(unfinished(sweep, progress)):
            names = {run.request.out: run.name for run in group}

            def add(request: EvalRequest, episode: Episode, names: dict[Path, str] = names) -> None:
                progress.add(names[request.out], episode)

            requests = [with_rate(run, sweep) for run in group]
            evaluate_together(requests, lambda *_: None, add, command, executor)


def with_rate(run: Run, sweep: Sweep) -> EvalRequest:
    """The run's request, with the rate that it takes over from another run, which is through."""
    if run.matched is None:
        return run.request
    path = next(other for other in sweep.runs if other.name == run.matched).request.results_file
    return replace(run.request, accept_rate=acceptance_rate(path, read_run(path)))
