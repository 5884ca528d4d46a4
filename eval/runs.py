"""Results files as the report needs them: checked against their own episodes, named, and paired with a baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsd_trt.config import MODES
from rsd_trt.errors import UserError
from rsd_trt.eval.compare import Comparison, compare, differences
from rsd_trt.eval.results import Results, read_results
from rsd_trt.eval.summary import summarise

COUNTS = ("total_episodes", "total_successes", "errors", "queries", "full_passes", "steps")


@dataclass(frozen=True)
class Run:
    """A run of a report. `versus` is its comparison with the run named `baseline`; `alone` says why there is none."""

    name: str
    path: Path
    results: Results
    baseline: str | None = None
    versus: Comparison | None = None
    alone: str | None = None

    @property
    def workers(self) -> int | None:
        return self.results.throughput.workers if self.results.throughput else None


def read_run(path: Path) -> Results:
    """A results file whose figures follow from its episodes.

    Raises:
        UserError: it cannot be read, holds an episode twice or one that was not asked for, mixes runs, or its
            counts are not those of its episodes.
    """
    results = read_results(path)
    settings = results.settings
    repeated = [key for key, count in Counter(episode.key for episode in results.episodes).items() if count > 1]
    if repeated:
        raise UserError(f"{path} holds task {repeated[0][0]}, trial {repeated[0][1]} twice. Evaluate again")
    for episode in results.episodes:
        if episode.task_id not in settings.tasks or not 0 <= episode.trial < settings.trials:
            raise UserError(
                f"{path} holds task {episode.task_id}, trial {episode.trial}, which its settings do not ask for "
                f"(tasks {list(settings.tasks)}, {settings.trials} trials). Evaluate again"
            )
        if episode.run != settings.run:
            raise UserError(
                f"{path} mixes runs: task {episode.task_id}, trial {episode.trial} is of run "
                f"{episode.run or '(none)'}, its settings are of {settings.run}. Evaluate again"
            )
    tasks = {task.task_id: task.task_description for task in results.task_results}
    if set(tasks) != set(settings.tasks):
        raise UserError(f"{path} has results for tasks {sorted(tasks)}, its settings ask for {list(settings.tasks)}")
    found = summarise(settings, results.episodes, tasks, results.codec_round_trip_mse, results.command)
    for name in COUNTS:
        if getattr(results, name) != getattr(found, name):
            raise UserError(
                f"{path} is damaged: {name} is {getattr(results, name)}, its episodes give {getattr(found, name)}"
            )
    return results


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """Every file as a run, baselines first, each compared with the baseline of the same settings.

    Raises:
        UserError: as `read_run`, or a file is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError(f"{path} is given twice")
    return pair_up([(path, read_run(path)) for path in paths])


def pair_up(runs: Sequence[tuple[Path, Results]]) -> tuple[Run, ...]:
    """Names the runs and compares each with its baseline."""
    ordered = sorted(runs, key=lambda run: MODES.index(run[1].settings.mode))
    names = run_names([results for _, results in ordered])
    named = [Run(name, path, results) for name, (path, results) in zip(names, ordered, strict=True)]
    baselines = [run for run in named if run.results.settings.mode == "baseline"]
    return tuple(run if run in baselines else _compared(run, baselines) for run in named)


def run_names(runs: Sequence[Results]) -> list[str]:
    """The mode of each run, and whatever else tells it from the others."""
    traits = [_traits(run) for run in runs]
    varying = [i for i in range(len(traits[0])) if len({trait[i] for trait in traits}) > 1] if traits else []
    names = [", ".join([run.settings.mode, *(t[i] for i in varying)]) for run, t in zip(runs, traits, strict=True)]
    seen = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if names.count(name) == 1 else f"{name}, #{n}" for name, n in zip(names, seen, strict=True)]


def _traits(run: Results) -> tuple[str, ...]:
    settings = run.settings
    workers = f"{run.throughput.workers} workers" if run.throughput else "interrupted"
    return (
        settings.suite,
        settings.bundle,
        settings.backend,
        settings.precision,
        f"{settings.n_action_steps} actions a query",
        f"protocol {settings.protocol}",
        f"{settings.timing} timing",
        workers,
    )


def _compared(run: Run, baselines: Sequence[Run]) -> Run:
    """`run` beside the baseline of the same settings; one of the same timing is preferred."""
    settings = run.results.settings
    if not baselines:
        return Run(run.name, run.path, run.results, alone="no baseline run is among the results")
    timed_alike = sorted(baselines, key=lambda other: other.results.settings.timing != settings.timing)
    reasons = [differences(other.results.settings, settings) for other in timed_alike]
    baseline, different = min(zip(timed_alike, reasons, strict=True), key=lambda pair: len(pair[1]))
    if different:
        reason = f"it differs from {baseline.name}: {'; '.join(different)}"
        return Run(run.name, run.path, run.results, alone=reason)
    try:
        versus = compare(baseline.results, run.results)
    except UserError as error:
        return Run(run.name, run.path, run.results, alone=str(error))
    return Run(run.name, run.path, run.results, baseline.name, versus)
