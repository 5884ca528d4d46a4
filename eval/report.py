"""A report on one or more runs: `performance_comparison.json`, `report.md` and `report.html`.

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
from rsd_trt.errors import UserError, missing_extra
from rsd_trt.eval import charts, grids, markdown, wording
from rsd_trt.eval.compare import Comparison, figures
from rsd_trt.eval.conclusion import Conclusion, Target, conclude, targets
from rsd_trt.eval.diagnosis import Finding, diagnose
from rsd_trt.eval.gallery import Gallery, gallery
from rsd_trt.eval.grids import Grid
from rsd_trt.eval.plots import check_plots
from rsd_trt.eval.results import Settings, TaskResult, Throughput
from rsd_trt.eval.runs import Run, read_runs
from rsd_trt.eval.statistics import Interval
from rsd_trt.eval.svg import Chart
from rsd_trt.files import replacing
from rsd_trt.jsonio import to_json

TEMPLATES = Path(__file__).with_name("templates")
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
    command: str


@dataclass(frozen=True)
class PerformanceComparison:
    """`performance_comparison.json`: what the report says, for programs."""

    conclusion: Conclusion
    runs: tuple[RunSummary, ...]
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


def write_report(paths: Sequence[Path], out: Path, command: str) -> Written:
    """Reads results files and writes the report into `out`. The three files are replaced together once all of them are
    on the disk; other files in `out` stay.

    Raises:
        UserError: a results file cannot be used, `out` cannot be written, or jinja2 or matplotlib is not installed.
    """
    check_plots()
    _check_templates()
    runs = read_runs(paths)
    comparison = _comparison(runs, command)
    page = _page(runs, comparison)
    texts = {
        "performance_comparison.json": json.dumps(to_json(comparison), indent=1) + "\n",
        "report.md": _render("report.md.jinja", page),
        "report.html": _render("report.html.jinja", page),
    }
    try:
        with contextlib.ExitStack() as stack:
            for name, text in texts.items():
                with stack.enter_context(replacing(out / name)).open("wb") as stream:
                    stream.write(text.encode())
                    stream.flush()
                    os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return Written(tuple(out / name for name in texts), comparison, runs)


def _comparison(runs: Sequence[Run], command: str) -> PerformanceComparison:
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
            command=run.results.command,
        )
        for run in runs
    )
    told = [run for run in runs if not run.throughput_only]
    return PerformanceComparison(conclude(told), summaries, diagnose(told), command)


def _page(runs: Sequence[Run], comparison: PerformanceComparison) -> Page:
    told = [run for run in runs if not run.throughput_only]
    by_name = {run.name: run for run in told}
    timed = [run for run in told if _untimed(run) is None]
    shared, varying = grids.settings_grids(runs)
    suites = dict.fromkeys(run.results.task_suite for run in runs)
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


def _check_templates() -> None:
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise missing_extra("jinja2", "report") from None


def _render(template: str, page: Page) -> str:
    """The page through a template; whatever it shows is escaped for HTML, or for Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    html = template.startswith("report.html")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        finalize=None if html else markdown.text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"table": markdown.table, "code": markdown.code}
    return environment.get_template(template).render(page=page, words=wording)
