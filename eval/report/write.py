"""A report on one or more runs: `performance_comparison.json`, `report.md` and `report.html`, and `tradeoff.png` where
the runs make a curve of success against cost.

The same results files give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rsd_trt import __version__
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.replay_record import Replay, read_replay
from rsd_trt.eval.report import charts, grids
from rsd_trt.eval.report.compare import Comparison, figures
from rsd_trt.eval.report.conclusion import Conclusion, Target, conclude, targets
from rsd_trt.eval.report.diagnosis import Finding, diagnose
from rsd_trt.eval.report.gallery import Gallery, gallery
from rsd_trt.eval.report.grids import Grid
from rsd_trt.eval.report.page import check_templates, render
from rsd_trt.eval.report.plots import check_plots
from rsd_trt.eval.report.runs import Run, read_runs, timed_by
from rsd_trt.eval.report.svg import Chart
from rsd_trt.eval.report.tradeoff import Tradeoff, tradeoff
from rsd_trt.eval.report.tradeoff_chart import has_curve, tradeoff_chart, tradeoff_png
from rsd_trt.eval.results import Settings, TaskResult, Throughput
from rsd_trt.eval.statistics import Interval
from rsd_trt.files import replacing
from rsd_trt.jsonio import to_json

PICTURE = "tradeoff.png"
COMPARISON_VERSION = 1


@dataclass(frozen=True)
class RunSummary:
    """A run in `performance_comparison.json`."""

    name: str
    file: str
    settings: Settings
    figures: dict[str, float | None]
    final_success_interval: Annotated[Interval | None, "95%, Wilson's score"]
    task_results: tuple[TaskResult, ...]
    throughput: Throughput | None
    throughput_only: Annotated[bool, "another run of its kind asked for more, or for the same on other workers"]
    targets: tuple[Target, ...]
    baseline: Annotated[str | None, "the name of the run that it is compared with"]
    comparison: Comparison | None
    not_compared: Annotated[str | None, "why it is compared with none"]
    control: Annotated[str | None, "rsd: the name of the run of mode random that it is compared with, too"]
    control_comparison: Comparison | None
    command: str


@dataclass(frozen=True)
class PerformanceComparison:
    """`performance_comparison.json`: what the report says, for programs."""

    conclusion: Conclusion
    runs: tuple[RunSummary, ...]
    tradeoff: Annotated[Tradeoff | None, "null without a replay, and without a curve"]
    diagnosis: tuple[Finding, ...]
    command: str
    rsd_trt: Annotated[str, "version"] = __version__
    schema_version: int = COMPARISON_VERSION


@dataclass(frozen=True)
class Written:
    """A report on disk."""

    files: tuple[Path, ...]
    comparison: PerformanceComparison
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Illustrated:
    """A finding with its picture."""

    finding: Finding
    grid: Grid
    chart: Chart | None


@dataclass(frozen=True)
class Page:
    """All that the templates show."""

    comparison: PerformanceComparison
    title: str
    tiles: tuple[RunSummary, ...]  # the runs whose targets head the page
    summary: Grid
    targets: Grid
    other_targets: Grid  # of the runs that do not head the page
    success: Chart | None
    comparisons: Grid
    points: Grid
    same_cost: Grid
    tradeoff_chart: Chart | None
    picture: str | None  # the name of the same chart's file
    tasks: Grid
    phases: Grid
    phase_charts: tuple[Chart, ...]
    routes: Grid
    route_charts: tuple[Chart, ...]
    not_timed: tuple[str, ...]  # why a run has no latencies
    throughput: Grid
    throughput_chart: Chart | None
    findings: tuple[Illustrated, ...]
    gallery: Gallery
    files: Grid
    shared: Grid
    varying: Grid


def write_report(paths: Sequence[Path], out: Path, command: str, replay: Path | None = None) -> Written:
    """Reads results files, and the replay of those without times, and writes the report into `out`. Its files are
    replaced together once all of them are on the disk; other files in `out` stay.

    Raises:
        UserError: a results file or the replay cannot be used, `out` cannot be written, or jinja2 or matplotlib is not
            installed.
    """
    check_plots()
    check_templates()
    runs = read_runs(paths)
    record = read_replay(replay) if replay is not None else None
    if record is not None:
        runs = timed_by(record, runs)
    comparison = _comparison(runs, command, record)
    page = _page(runs, comparison)
    texts = {
        "performance_comparison.json": (json.dumps(to_json(comparison), indent=1) + "\n").encode(),
        "report.md": render("report.md.jinja", page).encode(),
        "report.html": render("report.html.jinja", page).encode(),
    }
    if comparison.tradeoff is not None and page.picture is not None:
        texts[page.picture] = tradeoff_png(comparison.tradeoff)
    try:
        with contextlib.ExitStack() as stack:
            for name, text in texts.items():
                with stack.enter_context(replacing(out / name)).open("wb") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return Written(tuple(out / name for name in texts), comparison, runs)


def _comparison(runs: Sequence[Run], command: str, replay: Replay | None) -> PerformanceComparison:
    summaries = tuple(
        RunSummary(
            name=run.name,
            file=str(run.path),
            settings=run.results.settings,
            figures=figures(run.results),
            final_success_interval=run.results.final_success_interval,
            task_results=run.results.task_results,
            throughput=run.results.throughput,
            throughput_only=run.throughput_only,
            targets=() if run.throughput_only else targets(run),
            baseline=run.baseline,
            comparison=run.versus,
            not_compared=run.alone,
            control=run.control,
            control_comparison=run.versus_control,
            command=run.results.command,
        )
        for run in runs
    )
    told = [run for run in runs if not run.throughput_only]
    found = tradeoff(told, replay)
    shown = found if replay is not None or has_curve(found) else None
    return PerformanceComparison(conclude(told, shown), summaries, shown, diagnose(told), command)


def _page(runs: Sequence[Run], comparison: PerformanceComparison) -> Page:
    told = [run for run in runs if not run.throughput_only]
    by_name = {run.name: run for run in told}
    timed = [run for run in told if _untimed(run) is None]
    shared, varying = grids.settings_grids(runs)
    suites = dict.fromkeys(run.results.task_suite for run in runs)
    found = comparison.tradeoff
    drawn = found is not None and has_curve(found)
    heads = [run.name for run in told if run.results.settings.mode == "rsd"] or list(by_name)
    return Page(
        comparison=comparison,
        title=f"Residual speculative decoding on {', '.join(suites)}",
        tiles=tuple(run for run in comparison.runs if run.name in heads),
        summary=grids.summary_grid(runs),
        targets=grids.targets_grid(told),
        other_targets=grids.targets_grid([run for run in told if run.name not in heads]),
        success=charts.success_chart(told),
        comparisons=grids.comparisons_grid(told),
        points=grids.points_grid(found) if found is not None else Grid((), ()),
        same_cost=grids.same_cost_grid(found) if found is not None else Grid((), ()),
        tradeoff_chart=tradeoff_chart(found) if found is not None and drawn else None,
        picture=PICTURE if drawn else None,
        tasks=grids.tasks_grid(told),
        phases=grids.phases_grid(told),
        phase_charts=tuple(chart for run in told if (chart := charts.phase_chart(run))),
        routes=grids.routes_grid(timed),
        route_charts=tuple(chart for run in timed if (chart := charts.route_chart(run))),
        not_timed=tuple(f"{run.name}: {reason}" for run in told if (reason := _untimed(run))),
        throughput=grids.throughput_grid(runs),
        throughput_chart=charts.throughput_chart(runs),
        findings=tuple(_illustrated(finding, by_name) for finding in comparison.diagnosis),
        gallery=gallery(told),
        files=grids.files_grid(runs),
        shared=shared,
        varying=varying,
    )


def _untimed(run: Run) -> str | None:
    """Why a run's latencies by route are not shown."""
    if run.results.settings.timing == "batched":
        return "not shown, since queries that share a forward say nothing of one alone (batched timing)"
    if run.results.settings.mode == "shadow":
        return "not shown, since shadow mode runs draft and main head at every query"
    return None if run.results.queries else "no query was made"


def _illustrated(finding: Finding, runs: dict[str, Run]) -> Illustrated:
    grid = Grid(finding.columns, finding.rows)
    if finding.picture is None:
        return Illustrated(finding, grid, None)
    source = runs[finding.source]
    return Illustrated(finding, grid, charts.picture(finding.picture, source.name, source.results))
