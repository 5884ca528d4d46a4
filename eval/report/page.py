"""The pages of a report: sections of tables and charts, which show themselves, in templates that escape the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsd_trt import __version__
from rsd_trt.errors import missing_extra
from rsd_trt.eval.report import charts, tables
from rsd_trt.eval.report.answer import Answer, answer
from rsd_trt.eval.report.cost import Price, cannot_save_time, disturbances
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.svg import Chart
from rsd_trt.eval.report.timeline import Timelines, timelines
from rsd_trt.eval.table import Table, markdown_text

TEMPLATES = Path(__file__).with_name("templates")
PICTURE = "frontier.png"


@dataclass(frozen=True)
class Section:
    """A part of the pages, which HTML shows when it is asked to. empty: what to say without tables and charts."""

    title: str
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()
    empty: str = "Not measured."


@dataclass(frozen=True)
class Page:
    """All that the templates show."""

    title: str
    version: str
    notices: tuple[str, ...]  # what has to be known before anything else
    answer: Answer
    disturbed: str | None  # what disturbed the clocks
    matrix: Table
    charts: tuple[Chart, ...]
    picture: str | None  # the file of the chart of success against cost
    timelines: Timelines
    sections: tuple[Section, ...]
    commands: tuple[str, ...]


def make_page(runs: Sequence[Run], price: Price, command: str) -> Page:
    """What the pages on these runs show."""
    results = [run.results for run in runs]
    untrained = [run.name for run in runs if not run.results.settings.of_bundle.trained]
    said = "is untrained (random weights): these figures show that the tools work, and say nothing about a policy."
    frontier = charts.frontier_charts(runs, price)
    notices = [
        cannot_save_time(results),
        f"The bundle of {', '.join(untrained)} {said}" if untrained else None,
    ]
    timed = [run for run in runs if _untimed(run) is None]
    why: dict[str, list[str]] = {}
    for run in runs:
        if (reason := _untimed(run)) is not None:
            why.setdefault(reason, []).append(str(run.number))
    untimed = tuple(f"Not shown of runs {', '.join(numbers)}: {reason}." for reason, numbers in why.items())
    return Page(
        title=f"Residual speculative decoding on {', '.join(dict.fromkeys(one.task_suite for one in results))}",
        version=__version__,
        notices=tuple(notice for notice in notices if notice is not None),
        answer=answer(runs, price),
        disturbed=disturbances([(f"run {run.number}", run.results) for run in runs], price),
        matrix=tables.matrix(runs, price),
        charts=(*frontier, *charts.task_charts(runs)),
        picture=PICTURE if frontier else None,
        timelines=timelines(runs),
        sections=(
            Section("Against open loop", (tables.rivals_table(runs),), empty="No run is set against another."),
            Section("Counts", (tables.all_counts_table(runs),)),
            Section("Tasks", (tables.suites_table(runs),)),
            Section(
                "Acceptance",
                (*tables.shadow_tables(runs), tables.tokens_table(runs)),
                _drawn(charts.phase_chart(runs)),
                empty="Not measured: no query checked a chunk.",
            ),
            Section("Actions", (tables.actions_table(runs), tables.codec_table(runs))),
            Section("Latency", (tables.routes_table(timed),), _drawn(charts.latency_chart(timed)), untimed),
            Section("Throughput", (tables.throughput_table(runs),)),
            Section("Configuration", (*tables.settings_tables(runs), tables.files_table(runs))),
        ),
        commands=(*(one.command for one in results), command),
    )


def _drawn(found: Chart | None) -> tuple[Chart, ...]:
    return () if found is None else (found,)


def _untimed(run: Run) -> str | None:
    """Why a run's latencies by route are not shown."""
    if run.results.settings.timing == "batched":
        return "queries that share a forward say nothing of one alone (batched timing)"
    if run.results.settings.mode == "shadow":
        return "shadow mode runs draft and main head at every query"
    return None if run.results.queries else "no query was made"


def check_templates() -> None:
    """Raises UserError unless pages can be made: to be called before what they show is measured."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise missing_extra("jinja2", "report") from None


def render(template: str, page: object) -> str:
    """The page through a template; whatever it shows is escaped for HTML, or for Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    html = template.endswith(".html.jinja")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        finalize=None if html else as_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code
    return environment.get_template(template).render(page=page)


class Markdown(str):
    """Text that is Markdown already."""


def as_markdown(value: object) -> object:
    """A table as a pipe table, foreign text on one line and harmless."""
    if isinstance(value, Table):
        return Markdown(value.markdown())
    return markdown_text(value) if isinstance(value, str) and not isinstance(value, Markdown) else value


def code(line: str) -> Markdown:
    """A line of a code block, where nothing is markup."""
    return Markdown("    " + " ".join(line.split()))
