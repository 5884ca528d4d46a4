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
from rsd_trt.eval.plots import check_plots
from rsd_trt.eval.profile.replay_record import read_replay
from rsd_trt.eval.report.breakdown import Breakdown
from rsd_trt.eval.report.compare import Comparison, figures
from rsd_trt.eval.report.page import check_templates, make_page, render
from rsd_trt.eval.report.runs import Run, read_runs
from rsd_trt.eval.report.targets import Target
from rsd_trt.eval.report.tradeoff import Tradeoff, tradeoff
from rsd_trt.eval.report.tradeoff_chart import tradeoff_png
from rsd_trt.eval.results import Settings, TaskResult, Throughput
from rsd_trt.eval.statistics import Interval
from rsd_trt.files import replacing
from rsd_trt.records import to_json

COMPARISON_VERSION = 2


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
    breakdown: Breakdown
    command: str


@dataclass(frozen=True)
class PerformanceComparison:
    """`performance_comparison.json`: what the report says, for programs."""

    runs: tuple[RunSummary, ...]
    tradeoff: Tradeoff
    command: str
    rsd_trt: Annotated[str, "version"] = __version__
    schema_version: int = COMPARISON_VERSION


@dataclass(frozen=True)
class Written:
    """A report on disk."""

    files: tuple[Path, ...]
    comparison: PerformanceComparison
    runs: tuple[Run, ...]


def write_report(paths: Sequence[Path], out: Path, command: str, replay: Path | None = None) -> Written:
    """Reads results files, and the replay of those without times, and writes the report into `out`. Its files are
    replaced together once all of them are on the disk; other files in `out` stay.

    Raises:
        UserError: a results file or the replay cannot be used, `out` cannot be written, or jinja2 or matplotlib is not
            installed.
    """
    check_plots()
    check_templates()
    record = read_replay(replay) if replay is not None else None
    runs = read_runs(paths, record)
    found = tradeoff([run for run in runs if not run.throughput_only], record)
    comparison = PerformanceComparison(tuple(map(_summary, runs)), found, command)
    page = make_page(runs, found, command)
    texts = {
        "performance_comparison.json": (json.dumps(to_json(comparison), indent=1) + "\n").encode(),
        "report.md": render("report.md.jinja", page).encode(),
        "report.html": render("report.html.jinja", page).encode(),
    }
    if page.picture is not None:
        texts[page.picture] = tradeoff_png(found)
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


def _summary(run: Run) -> RunSummary:
    return RunSummary(
        name=run.name,
        file=str(run.path),
        settings=run.results.settings,
        figures=figures(run.results),
        final_success_interval=run.results.final_success_interval,
        task_results=run.results.task_results,
        throughput=run.results.throughput,
        throughput_only=run.throughput_only,
        targets=run.targets,
        baseline=run.baseline,
        comparison=run.versus,
        not_compared=run.alone,
        control=run.control,
        control_comparison=run.versus_control,
        breakdown=run.breakdown,
        command=run.results.command,
    )
