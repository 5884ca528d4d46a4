"""A report on one or more runs: `performance_comparison.json`, `report.md` and `report.html`, and `frontier.png` where
the cost of some run is known.

The same results files give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rsd_trt import __version__
from rsd_trt.eval.plots import check_plots
from rsd_trt.eval.report.breakdown import Breakdown
from rsd_trt.eval.report.charts import frontier_png
from rsd_trt.eval.report.cost import Price, cannot_save_time, measured
from rsd_trt.eval.report.page import check_templates, make_page, render
from rsd_trt.eval.report.runs import Against, Run, read_runs
from rsd_trt.eval.results import RATE_INTERVAL, RsdStats, Settings, TaskResult, Throughput
from rsd_trt.eval.statistics import Interval
from rsd_trt.files import replacing, writing
from rsd_trt.load import Steadiness
from rsd_trt.records import to_json

COMPARISON_VERSION = 4


@dataclass(frozen=True)
class RunSummary:
    """A run in `performance_comparison.json`."""

    name: str
    file: str
    settings: Settings
    episodes: int
    errors: int
    success_rate: float | None
    success_interval: Annotated[Interval | None, RATE_INTERVAL]
    within: Annotated[int, "steps of the endpoint"]
    reached_rate: Annotated[float | None, "of success within so many steps"]
    reached_interval: Annotated[Interval | None, RATE_INTERVAL]
    mean_steps: Annotated[float | None, "to success, restricted to so many steps"]
    actions: int
    checks: int
    full_queries: int
    unusable_drafts: int
    clipped_steps: int
    cost_per_action: Annotated[float | None, "in the price's unit"]
    measured_ms_per_action: Annotated[float | None, "by the medians of the routes of a run with one worker"]
    clock: Annotated[Steadiness | None, "how far its times can be trusted; null: not recorded"]
    rsd_stats: RsdStats
    against: tuple[Against, ...]
    alone: Annotated[str | None, "why it is set against no run of open loop"]
    task_results: tuple[TaskResult, ...]
    throughput: Throughput | None
    breakdown: Breakdown
    command: str


@dataclass(frozen=True)
class PerformanceComparison:
    """`performance_comparison.json`: what the report says, for programs."""

    notice: Annotated[str | None, "that a draft cannot save time"]
    price: Price
    runs: tuple[RunSummary, ...]
    command: str
    rsd_trt: Annotated[str, "version"] = __version__
    schema_version: int = COMPARISON_VERSION


@dataclass(frozen=True)
class Written:
    """A report on disk."""

    files: tuple[Path, ...]
    comparison: PerformanceComparison
    runs: tuple[Run, ...]


def write_report(
    paths: Sequence[Path],
    out: Path,
    command: str,
    profile: Path | None = None,
    within: int | None = None,
    declared: Mapping[Path, Collection[str]] | None = None,
) -> Written:
    """Reads results files and writes the report into `out`. Its files are replaced together once all of them are on the
    disk; other files in `out` stay.

    profile: `profile.json`, whose costs price the runs' counts. within: steps of the endpoint, if not the suite's.
    declared: as `rsd_trt.eval.report.runs.pair_up`.

    Raises:
        UserError: a results file or the profile cannot be used, `out` cannot be written, or jinja2 or matplotlib is
            not installed.
    """
    check_plots()
    check_templates()
    price, runs = read_runs(paths, profile, within, declared)
    notice = cannot_save_time([run.results for run in runs])
    comparison = PerformanceComparison(notice, price, tuple(map(_summary, runs)), command)
    page = make_page(runs, price, command)
    texts = {
        "performance_comparison.json": (json.dumps(to_json(comparison), indent=1) + "\n").encode(),
        "report.md": render("report.md.jinja", page).encode(),
        "report.html": render("report.html.jinja", page).encode(),
    }
    if page.picture is not None and (picture := frontier_png(runs, price)) is not None:
        texts[page.picture] = picture
    with writing(out), contextlib.ExitStack() as stack:
        for name, text in texts.items():
            with stack.enter_context(replacing(out / name)).open("wb") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
    return Written(tuple(out / name for name in texts), comparison, tuple(runs))


def _summary(run: Run) -> RunSummary:
    found = run.results
    return RunSummary(
        name=run.name,
        file=str(run.path),
        settings=found.settings,
        episodes=found.total_episodes,
        errors=found.errors,
        success_rate=found.final_success_rate,
        success_interval=found.final_success_interval,
        within=run.endpoint.within,
        reached_rate=run.reached,
        reached_interval=run.reached_interval,
        mean_steps=run.mean_steps,
        actions=found.steps,
        checks=found.checks,
        full_queries=found.full_queries,
        unusable_drafts=found.unusable_drafts,
        clipped_steps=found.clipped_steps,
        cost_per_action=run.cost,
        measured_ms_per_action=measured(found),
        clock=found.clock,
        rsd_stats=found.rsd_stats,
        against=run.against,
        alone=run.alone,
        task_results=found.task_results,
        throughput=found.throughput,
        breakdown=run.breakdown,
        command=found.command,
    )
