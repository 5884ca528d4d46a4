"""The pages of a report: sections of tables and charts, which show themselves, in templates that escape the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsd_trt import __version__
from rsd_trt.errors import missing_extra
from rsd_trt.eval.report import tables
from rsd_trt.eval.report.charts import frontier_chart, phase_chart
from rsd_trt.eval.report.cost import Price, cannot_save_time, disturbances
from rsd_trt.eval.report.gallery import Gallery, gallery
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.svg import Chart
from rsd_trt.eval.table import Table, markdown_text

TEMPLATES = Path(__file__).with_name("templates")
PICTURE = "frontier.png"


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
    notices: tuple[str, ...]  # what has to be known before anything else
    picture: str | None  # the file of the chart of success against cost
    sections: tuple[Section, ...]
    gallery: Gallery
    commands: tuple[str, ...]


def make_page(runs: Sequence[Run], price: Price, command: str) -> Page:
    """What the pages on these runs show."""
    results = [run.results for run in runs]
    untrained = [run.name for run in runs if not run.results.settings.of_bundle.trained]
    said = "is untrained (random weights): these figures show that the tools work, and say nothing about a policy."
    frontier = frontier_chart(runs, price)
    notices = [
        cannot_save_time(results),
        f"The bundle of {', '.join(untrained)} {said}" if untrained else None,
        *disturbances([(run.name, run.results) for run in runs], price),
    ]
    timed = [run for run in runs if _untimed(run) is None]
    why = tuple(f"{run.name}: {reason}." for run in runs if (reason := _untimed(run)) is not None)
    odd = "No executed action is odd beside the training data."
    return Page(
        title=f"Residual speculative decoding on {', '.join(dict.fromkeys(one.task_suite for one in results))}",
        version=__version__,
        notices=tuple(notice for notice in notices if notice is not None),
        picture=PICTURE if frontier is not None else None,
        sections=(
            Section("Runs", (tables.matrix(runs, price), tables.rivals_table(runs)), _drawn([frontier])),
            Section("Tasks", (tables.suites_table(runs),)),
            Section(
                "Acceptance",
                (tables.phases_table(runs), *tables.agreement_tables(runs)),
                _drawn(map(phase_chart, runs)),
                empty="Not measured: no query checked a chunk.",
            ),
            Section("Actions", (tables.actions_table(runs), tables.codec_table(runs)), empty=odd),
            Section("Latency", (tables.routes_table(timed),), notes=why),
            Section("Throughput", (tables.throughput_table(runs),)),
            _configuration(runs),
        ),
        gallery=gallery(runs),
        commands=(*(one.command for one in results), command),
    )


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
