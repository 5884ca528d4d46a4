"""The report's tables, as columns and rows of text that the HTML and the Markdown page share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsd_trt.eval.report.breakdown import PHASES, phases, route_times
from rsd_trt.eval.report.compare import Comparison, SpeedUp
from rsd_trt.eval.report.conclusion import targets
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.tradeoff import Tradeoff
from rsd_trt.eval.report.wording import ABSENT, interval, listed, number
from rsd_trt.eval.results import Results, TaskResult
from rsd_trt.eval.statistics import counted
from rsd_trt.jsonio import to_json

UNTIMED = "not measured"  # of a batched run


@dataclass(frozen=True)
class Grid:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summary_grid(runs: Sequence[Run]) -> Grid:
    """A row for each run."""
    columns = ("run", "backend", "n_action_steps", "timing", "episodes", "success (95% interval)")
    return Grid(
        (*columns, "ms per action", "actions per query", "accepted", "partial", "rejected"),
        tuple(_summary_row(run.name, run.results) for run in runs),
    )


def _summary_row(name: str, results: Results) -> tuple[str, ...]:
    settings, stats = results.settings, results.rsd_stats
    batched = settings.timing == "batched"
    return (
        name,
        f"{settings.backend} {settings.precision}, {settings.backbone_name} backbone",
        number(settings.n_action_steps),
        settings.timing,
        number(results.total_episodes) + _errors(results.errors),
        _rate(results.total_successes, results.total_episodes, results.final_success_interval),
        UNTIMED if batched else number(results.avg_inference_time_ms),
        number(results.actions_per_query),
        number(stats.draft_acceptance_rate, "%"),
        number(stats.partial_acceptance_rate, "%"),
        number(stats.full_rejection_rate, "%"),
    )


def targets_grid(runs: Sequence[Run]) -> Grid:
    """What each run says about the targets."""
    return Grid(
        ("run", "target", "measured", "95% interval", "verdict"),
        tuple(
            (
                run.name,
                f"{target.what} > {target.bound}",
                number(target.value, target.unit),
                interval(target.interval, target.unit),
                f"{target.verdict} ({target.reason})" if target.reason else target.verdict,
            )
            for run in runs
            for target in targets(run)
        ),
    )


def comparisons_grid(runs: Sequence[Run]) -> Grid:
    """Every run against its baseline, or why not, and those of mode rsd against their control."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        if run.versus is not None:
            rows.append(_compared(run.name, run.baseline, run.versus))
        elif run.alone is not None:
            rows.append((run.name, run.alone, *[ABSENT] * 7))
    rows += [_compared(run.name, run.control, run.versus_control) for run in runs if run.versus_control is not None]
    columns = ("run", "against", "pairs", "left out", "success", "gained", "lost", "McNemar p", "speed-up (95%)")
    return Grid(columns, tuple(rows))


def _compared(name: str, other: str | None, versus: Comparison) -> tuple[str, ...]:
    test = versus.mcnemar
    speedup = _speedup(versus.speedup) if versus.speedup else versus.no_speedup or ABSENT
    changed = (f"{versus.success_points:+.1f} points", number(test.gained), number(test.lost), f"{test.p:.2g}")
    return (name, other or ABSENT, number(versus.pairs), number(versus.left_out), *changed, speedup)


def _speedup(found: SpeedUp | None) -> str:
    """`1.31x (1.28x to 1.33x)`."""
    if found is None:
        return ABSENT
    return f"{number(found.value, 'x')} ({interval(found.interval, 'x') if found.interval else 'too few episodes'})"


def points_grid(found: Tradeoff) -> Grid:
    """Every run whose cost is known, and how many times that the baseline of as many actions a query takes."""
    columns = ("run", "n_action_steps", "episodes", "success (95% interval)", "time per action (95%)", "times")
    rows = tuple(
        (
            p.run,
            number(p.n_action_steps),
            number(p.episodes),
            f"{number(p.success, '%')} ({interval(p.success_interval, '%')})",
            number(p.ms, "ms") + (f" ({interval(p.ms_interval, 'ms')})" if p.ms_interval else ""),
            "replayed" if p.replayed else "the run's own",
            _speedup(p.speedup),
        )
        for p in found.points
    )
    return Grid((*columns, "speed-up over the baseline of as many actions (95%)"), rows)


def same_cost_grid(found: Tradeoff) -> Grid:
    """Every run that is no baseline against the baseline that costs the same."""
    rows = []
    for row in found.same_cost:
        near = [f"{n.share:.0%} {n.run} ({number(n.ms, 'ms')}; {_points(n.versus)})" for n in row.neighbours]
        baseline, own = row.success or (None, None)
        rows.append(
            (
                row.run,
                listed(near) or ABSENT,
                number(row.pairs),
                number(baseline, "%"),
                number(own, "%"),
                ABSENT if row.p is None else f"{row.p:.2g}",
                row.verdict,
            )
        )
    columns = ("run", "the baseline that costs the same (the run against each)", "pairs", "its success", "the run's")
    return Grid((*columns, "p", "verdict"), tuple(rows))


def _points(versus: Comparison) -> str:
    return f"{versus.success_points:+.1f} points, McNemar p {versus.mcnemar.p:.2g}"


def tasks_grid(runs: Sequence[Run]) -> Grid:
    """A row for each task of each suite, a column for each run."""
    found: dict[tuple[str, int], dict[int, TaskResult]] = {}
    for i, run in enumerate(runs):
        for task in run.results.task_results:
            found.setdefault((run.results.task_suite, task.task_id), {})[i] = task
    suites = {suite for suite, _ in found}
    rows = []
    for (suite, task_id), by_run in sorted(found.items()):
        description = next(iter(by_run.values())).task_description
        title = f"{suite} {task_id}: {description}" if len(suites) > 1 else f"{task_id}: {description}"
        rows.append((title, *(_task(by_run.get(i)) for i in range(len(runs)))))
    return Grid(("task", *(run.name for run in runs)), tuple(rows))


def _task(task: TaskResult | None) -> str:
    if task is None:
        return ABSENT
    return _rate(task.successes, task.episodes, task.success_interval) + _errors(task.errors)


def phases_grid(runs: Sequence[Run]) -> Grid:
    """Share of accepted queries by decile of the episode, a column for each run that tested a live plan."""
    known = [(run.name, phases(run.results)) for run in runs if run.results.rsd_stats.draft_acceptance_rate is not None]
    rows = [
        (
            f"{i * 100 // PHASES}% to {(i + 1) * 100 // PHASES}%",
            *(
                f"{number(of[i].accepted / of[i].tested, '%')} of {of[i].tested:,}" if of[i].tested else ABSENT
                for _, of in known
            ),
        )
        for i in range(PHASES)
    ]
    return Grid(("episode", *(f"{name}: accepted" for name, _ in known)), tuple(rows) if known else ())


def routes_grid(runs: Sequence[Run]) -> Grid:
    """Latency by kind of route, for runs in which it means something."""
    rows = []
    for run in runs:
        for part in route_times(run.results):
            spread = (number(float(p), "ms") for p in np.percentile(part.ms, (5, 50, 95, 99)))
            rows.append((run.name, part.group, number(len(part.ms)), *spread, number(part.share, "%")))
    return Grid(("run", "route", "queries", "p5", "p50", "p95", "p99", "share of policy time"), tuple(rows))


def throughput_grid(runs: Sequence[Run]) -> Grid:
    """How fast each run was as a whole."""
    columns = ("run", "workers", "wall time", "episodes/s", "rows per forward", "policy computes", "bound by the")
    rows: list[tuple[str, ...]] = []
    for run in runs:
        if (found := run.results.throughput) is None:
            rows.append((run.name, "interrupted: not measured", *[ABSENT] * 6))
            continue
        rows.append(
            (
                run.name,
                number(found.workers),
                number(found.wall_seconds, "s"),
                number(found.episodes_per_second),
                number(found.rows_per_forward),
                number(found.policy_share, "%"),
                found.bound,
                number(found.gpu_utilisation, "%"),
            )
        )
    return Grid((*columns, "GPU utilisation"), tuple(rows))


def files_grid(runs: Sequence[Run]) -> Grid:
    """Which files the report is made from, by their contents."""
    digests = [hashlib.sha256(run.path.read_bytes()).hexdigest() for run in runs]
    rows = [
        (run.name, str(run.path), digest, run.results.settings.run) for run, digest in zip(runs, digests, strict=True)
    ]
    return Grid(("run", "file", "sha256", "id"), tuple(rows))


def settings_grids(runs: Sequence[Run]) -> tuple[Grid, Grid]:
    """(settings that all runs share, settings that differ with a column for each run)."""
    flat = [dict(_flat(to_json(run.results.settings))) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [(key, tuple(settings.get(key, ABSENT) for settings in flat)) for key in keys]
    shared = tuple((key, values[0]) for key, values in rows if len(set(values)) == 1)
    varying = tuple((key, *values) for key, values in rows if len(set(values)) > 1)
    return Grid(("setting", "value"), shared), Grid(("setting", *(run.name for run in runs)), varying)


def _flat(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """A nested object as dotted keys and JSON texts."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _errors(count: int) -> str:
    return f", {counted(count, 'error')}" if count else ""


def _rate(successes: int, episodes: int, bounds: tuple[float, float] | None) -> str:
    if not episodes:
        return ABSENT
    unbroken = interval(bounds, "%").replace(" ", "\u00a0")
    return f"{successes:,}/{episodes:,}: {number(successes / episodes, '%')} ({unbroken})"
