"""The pages of a report: sections of tables and charts, which show themselves, in templates that escape the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsd_trt import __version__
from rsd_trt.errors import missing_extra
from rsd_trt.eval.report import charts, tables
from rsd_trt.eval.report.gallery import Gallery, gallery
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.svg import Chart
from rsd_trt.eval.report.tradeoff import Tradeoff
from rsd_trt.eval.report.tradeoff_chart import has_curve, tradeoff_chart
from rsd_trt.eval.statistics import counted
from rsd_trt.eval.table import Table, markdown_text

TEMPLATES = Path(__file__).with_name("templates")
PICTURE = "tradeoff.png"


@dataclass(frozen=True)
class Section:
    """A part of the pages. folded: a table that HTML shows when it is asked to. empty: what to say without tables."""

    title: str
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()
    folded: Table | None = None
    empty: str = "Not measured."

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Page:
    """All that the templates show."""

    title: str
    version: str
    picture: str | None  # the file of the chart of success against cost
    sections: tuple[Section, ...]
    gallery: Gallery
    commands: tuple[str, ...]


def make_page(runs: Sequence[Run], found: Tradeoff, command: str) -> Page:
    """What the pages on these runs show."""
    told = [run for run in runs if not run.throughput_only]
    suites = dict.fromkeys(run.results.task_suite for run in runs)
    return Page(
        title=f"Residual speculative decoding on {', '.join(suites)}",
        version=__version__,
        picture=PICTURE if has_curve(found) else None,
        sections=(
            _targets(told, found),
            _runs(told, found),
            Section("Tasks", (tables.suites_table(told),)),
            _acceptance(told),
            _actions(told),
            _latency(told),
            Section("Throughput", (tables.throughput_table(runs),), _drawn([charts.throughput_chart(runs)])),
            _configuration(runs),
        ),
        gallery=gallery(told),
        commands=(*(run.results.command for run in runs), command),
    )


def _targets(runs: Sequence[Run], found: Tradeoff) -> Section:
    untrained = [run.name for run in runs if not run.results.settings.of_bundle.trained]
    said = "is untrained (random weights): these figures show that the tools work, and say nothing about a policy."
    drawn = [tradeoff_chart(found) if has_curve(found) else None, charts.success_chart(runs)]
    notes = (f"The bundle of {', '.join(untrained)} {said}",) if untrained else ()
    return Section("Targets", (tables.targets_table(runs),), _drawn(drawn), notes)


def _runs(runs: Sequence[Run], found: Tradeoff) -> Section:
    """The runs, a table for each number of actions a query."""
    steps = sorted({run.results.settings.n_action_steps for run in runs})
    shown = tuple(
        tables.runs_table(
            {run.name: run.results for run in runs if run.results.settings.n_action_steps == n},
            f"{counted(n, 'action')} a query",
            found.points,
        )
        for n in steps
    )
    curve = (tables.same_cost_table(found),) if has_curve(found) else ()
    left_out = tuple(f"Not set against the others: {reason}." for reason in found.left_out) if curve else ()
    return Section("Runs", (*shown, tables.comparisons_table(runs), *curve), notes=left_out)


def _acceptance(runs: Sequence[Run]) -> Section:
    drawn = [*(charts.phase_chart(run) for run in runs), *(c for run in runs for c in charts.agreement_charts(run))]
    shown = (tables.phases_table(runs), *tables.agreement_tables(runs))
    return Section("Acceptance", shown, _drawn(drawn), empty="Not measured: no query tested a chunk.")


def _actions(runs: Sequence[Run]) -> Section:
    """Of runs whose success target is not met, which their actions may explain. Shadow mode acts as the baseline and is
    looked at where it is alone."""
    missed = [run for run in runs if any(t.what == "success" and t.verdict != "met" for t in run.targets)]
    missed = [run for run in missed if run.results.settings.mode != "shadow"] or missed
    drawn = _drawn(charts.actions_chart(run) for run in missed)
    shown = (tables.actions_table(missed), tables.codec_table(missed))
    return Section("Actions", shown, drawn, empty="Every run that has a success target meets it.")


def _latency(runs: Sequence[Run]) -> Section:
    timed = [run for run in runs if _untimed(run) is None]
    why = tuple(f"{run.name}: {reason}." for run in runs if (reason := _untimed(run)) is not None)
    return Section("Latency", (tables.routes_table(timed),), _drawn(map(charts.route_chart, timed)), why)


def _configuration(runs: Sequence[Run]) -> Section:
    varying, shared = tables.settings_tables(runs)
    return Section("Configuration", (varying, tables.files_table(runs)), folded=shared)


def _drawn(found: Iterable[Chart | None]) -> tuple[Chart, ...]:
    return tuple(chart for chart in found if chart is not None)


def _untimed(run: Run) -> str | None:
    """Why a run's latencies by route are not shown."""
    if run.results.settings.timing == "batched":
        return "not shown, since queries that share a forward say nothing of one alone (batched timing)"
    if run.results.settings.mode == "shadow":
        return "not shown, since shadow mode runs draft and main head at every query"
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
