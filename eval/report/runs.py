"""Runs as the report needs them: named, paired with a baseline, and with all that follows from them computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rsd_trt.config import MODES
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.replay_record import Replay, ReplayRow
from rsd_trt.eval.read import read_run
from rsd_trt.eval.report.breakdown import Breakdown, breakdown
from rsd_trt.eval.report.compare import Comparison, SpeedUp, compare, differences
from rsd_trt.eval.report.targets import Target, targets
from rsd_trt.eval.results import BundleSettings, Results
from rsd_trt.eval.statistics import counted
from rsd_trt.records import to_json

SAME_RATE = 0.01  # a control that accepts more or less often than that beside a run is none


@dataclass(frozen=True)
class Run:
    """A run of a report. `versus` is its comparison with the run named `baseline`; `alone` says why there is none.
    A run of mode rsd has the run of mode random named `control`, and `versus_control` is its comparison with that.

    throughput_only: another run of its kind asked for more episodes, or for the same on another number of workers, so
    that this one adds nothing but its throughput: it has no targets.
    """

    name: str
    path: Path
    results: Results
    breakdown: Breakdown
    throughput_only: bool = False
    baseline: str | None = None
    versus: Comparison | None = None
    alone: str | None = None
    control: str | None = None
    versus_control: Comparison | None = None
    targets: tuple[Target, ...] = ()


def read_runs(paths: Sequence[Path], replay: Replay | None = None) -> tuple[Run, ...]:
    """Every file, and every results file of a folder, as a run, as `pair_up`.

    Raises:
        UserError: as `read_run`, a file is given twice, or a run is not of a bundle.
    """
    paths = [file for path in paths for file in (_of_folder(path) if path.is_dir() else [path])]
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError(f"{path} is given twice")
    runs = [(path, read_run(path)) for path in paths]
    for path, results in runs:
        if results.settings.bundle is None:
            raise UserError(f"{path} is a run of {results.settings.policy}, a script; a report is on runs of bundles")
    return pair_up(runs, replay)


def _of_folder(folder: Path) -> list[Path]:
    """Its results files.

    Raises:
        UserError: it has none.
    """
    if not (found := sorted(folder.glob("*_results.json*"))):
        raise UserError(f"{folder} has no *_results.json", "rsd-trt eval writes them")
    return found


def pair_up(runs: Sequence[tuple[Path, Results]], replay: Replay | None = None) -> tuple[Run, ...]:
    """Names the runs, baselines first, compares each with the baseline of the same settings, and those of mode rsd with
    their control. replay: its speed-ups stand in the place of the runs' own."""
    ordered = sorted(runs, key=lambda run: MODES.index(run[1].settings.of_bundle.mode))
    every = [results for _, results in ordered]
    names = run_names(every)
    named = [
        Run(name, path, results, breakdown(results), _adds_only_throughput(results, every))
        for name, (path, results) in zip(names, ordered, strict=True)
    ]
    baselines = [run for run in named if run.results.settings.mode == "baseline"]
    controls = [run for run in named if run.results.settings.mode == "random" and not run.throughput_only]
    paired = tuple(
        run if run in baselines or run.throughput_only else _controlled(_compared(run, baselines), controls)
        for run in named
    )
    return tuple(_judged(run) for run in (paired if replay is None else _timed(replay, paired)))


def _judged(run: Run) -> Run:
    """With its targets."""
    if run.throughput_only:
        return run
    speedup, why = (run.versus.speedup, run.versus.no_speedup) if run.versus else (None, run.alone)
    return replace(run, targets=targets(run.results, speedup, why))


def run_names(runs: Sequence[Results]) -> list[str]:
    """The mode of each run, and whatever else it takes to tell it from the others. Where the tolerance or rate differs
    within a mode, every run of it is named with its own; where some are perturbed, every run says whether it is."""
    names = [run.settings.label for run in runs]
    modes, traits = list(names), [_traits(run) for run in runs]
    for trait in traits[0] if traits else ():
        among = {"variant": modes, "perturbed": [""] * len(runs)}.get(trait, names)
        alike = {group: {t[trait] for g, t in zip(among, traits, strict=True) if g == group} for group in among}
        told = [len(alike[group]) > 1 and bool(t[trait]) for group, t in zip(among, traits, strict=True)]
        names = [f"{n}, {t[trait]}" if tell else n for n, t, tell in zip(names, traits, told, strict=True)]
    seen = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if names.count(name) == 1 else f"{name}, #{n}" for name, n in zip(names, seen, strict=True)]


def _adds_only_throughput(run: Results, runs: Sequence[Results]) -> bool:
    """Of runs that differ in timing, tasks and trials only, those that asked for most episodes count, and of single
    timing those that did so there. Of the same episodes on other numbers of workers, single timing or the fewest
    workers count."""
    kind = {**to_json(run.settings), "timing": None, "tasks": None, "trials": None}
    alike = [r for r in runs if {**to_json(r.settings), "timing": None, "tasks": None, "trials": None} == kind]
    single = [r for r in alike if r.settings.timing == "single"]
    return not _counts(run, alike) and not (run.settings.timing == "single" and _counts(run, single))


def _counts(run: Results, runs: Sequence[Results]) -> bool:
    """Whether none of the runs stands for `run`."""
    return not any(_asked(other) > _asked(run) or _same_on_fewer_workers(other, run) for other in runs)


def _asked(run: Results) -> int:
    return len(run.settings.tasks) * run.settings.trials


def _same_on_fewer_workers(a: Results, b: Results) -> bool:
    """Whether `a` asked for the episodes of `b` on another number of workers, with single timing or on fewer."""
    if a.throughput is None or b.throughput is None or a.throughput.workers == b.throughput.workers:
        return False
    if (a.settings.tasks, a.settings.trials) != (b.settings.tasks, b.settings.trials):
        return False
    costs = [(run.settings.timing != "single", run.throughput.workers) for run in (a, b) if run.throughput]
    return costs[0] < costs[1]


def _timed(replay: Replay, runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs, with the replay's speed-ups in the place of those of their own times: it timed all of them alike."""
    return tuple(_timed_by(replay, run, {other.name: other for other in runs}) for run in runs)


def _timed_by(replay: Replay, run: Run, runs: Mapping[str, Run]) -> Run:
    row = replay.row(run.results.settings.run)
    if row is None or row.speedup is None or run.versus is None:
        return run
    baseline = replay.row(runs[run.baseline].results.settings.run) if run.baseline else None
    if baseline is None or baseline.run != row.baseline:
        return run
    cost = (baseline.ms_per_action, row.ms_per_action)
    return replace(run, versus=replace(run.versus, speedup=replayed(row), ms_per_action=cost, no_speedup=None))


def replayed(row: ReplayRow) -> SpeedUp | None:
    """The speed-up over the baseline that a replay measured."""
    return SpeedUp(row.speedup, row.speedup_interval, replayed=True) if row.speedup is not None else None


def _traits(run: Results) -> dict[str, str]:
    settings, bundle = run.settings, run.settings.of_bundle
    workers = counted(run.throughput.workers, "worker") if run.throughput else "interrupted"
    return {
        "suite": settings.suite,
        "bundle": settings.policy,
        "backend": bundle.backend,
        "precision": bundle.precision,
        "backbone": f"{bundle.backbone_name} backbone",
        "actions": f"{counted(settings.n_action_steps, 'action')} a query",
        "variant": variant(bundle),
        "protocol": f"protocol {settings.protocol}",
        "perturbed": condition(settings.perturb),
        "hardware": str(settings.hardware.get("gpu", settings.hardware.get("cpu", ""))),
        "timing": f"{settings.timing} timing",
        "workers": workers,
        "episodes": counted(run.total_episodes, "episode"),
    }


def _conditions(a: Run, b: Run) -> tuple[bool, bool]:
    """Whether two runs differ in hardware, and in timing."""
    x, y = a.results.settings, b.results.settings
    return x.hardware != y.hardware, x.timing != y.timing


def _apart(control: Run, accepted: float) -> float:
    """How far the rate of a control is from that."""
    return abs((control.results.settings.of_bundle.accept_rate or 0.0) - accepted)


def condition(perturb: str | None) -> str:
    """`unperturbed`, or `perturbed (late:7)`."""
    return "unperturbed" if perturb is None else f"perturbed ({perturb})"


def variant(settings: BundleSettings) -> str:
    """What decides acceptance beside the mode: the tolerance of `rsd` and `shadow`, the rate of `random`."""
    if settings.accept_rate is not None:
        return f"accepting {settings.accept_rate:.1%}"
    if settings.mode == "baseline" or settings.rsd.rule != "actions":
        return ""
    return f"tolerance {'/'.join(f'{x:g}' for x in dict.fromkeys(settings.rsd.tolerance))}"


def _compared(run: Run, baselines: Sequence[Run]) -> Run:
    """`run` beside the baseline of the same settings; one of the same hardware and timing is preferred."""
    settings = run.results.settings
    if not baselines:
        return replace(run, alone="no baseline run is among the results")
    nearest = sorted(baselines, key=lambda other: _conditions(other, run))
    reasons = [differences(other.results.settings, settings) for other in nearest]
    baseline, different = min(zip(nearest, reasons, strict=True), key=lambda pair: len(pair[1]))
    if different:
        reason = f"it differs from {baseline.name}: {'; '.join(different)}"
        return replace(run, alone=reason)
    try:
        versus = compare(baseline.results, run.results)
    except UserError as error:
        return replace(run, alone=str(error))
    return replace(run, baseline=baseline.name, versus=versus)


def _controlled(run: Run, controls: Sequence[Run]) -> Run:
    """A run of mode rsd beside the control of the same settings and of its own rate, if there is one."""
    settings = run.results.settings
    alike = [other for other in controls if not differences(other.results.settings, settings)]
    accepted = run.results.rsd_stats.draft_acceptance_rate
    if settings.mode != "rsd" or not alike or accepted is None:
        return run
    control = min(alike, key=lambda other: (_apart(other, accepted), _conditions(other, run)))
    if _apart(control, accepted) > SAME_RATE:
        return run
    with contextlib.suppress(UserError):  # they share no episode
        return replace(run, control=control.name, versus_control=compare(control.results, run.results))
    return run
