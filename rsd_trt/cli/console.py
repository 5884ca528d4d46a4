"""What the commands share: options, progress on stderr, tables on stdout."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from click.core import ParameterSource

from rsd_trt.config import BACKBONE_PRECISIONS, BACKBONES, DEFAULT_BUNDLE, DEFAULT_ENGINES, PRECISIONS
from rsd_trt.errors import UserError, did_you_mean
from rsd_trt.suites import ALL_SUITES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rsd_trt.eval.libero.request import EvalRequest
    from rsd_trt.eval.results import Episode
    from rsd_trt.export.run import Outcome

Request = TypeVar("Request")

BAR = 12  # columns: a terminal of 80 has room for words beside it


def from_options(make: Callable[..., Request], options: Mapping[str, object], **more: object) -> Request:
    """A request from a command's parameters, which have the names of its fields. more: fields that are made of some."""
    return make(**options, **more)


class Choice(click.Choice[str]):
    """One of some names; offers the nearest one for a wrong one."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            self.fail(f"{value!r} is unknown{did_you_mean(str(value), self.choices)}", param, ctx)
        return str(value)


class Suite(click.ParamType):  # type: ignore[type-arg]
    """The name of a suite; `help` prints all of them, one a line."""

    name = "suite"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "help" and ctx is not None:
            click.echo("\n".join(ALL_SUITES))
            ctx.exit()
        return value if value in ALL_SUITES else self.fail(f"{value!r} is unknown{did_you_mean(value, ALL_SUITES)}")


class FiniteRange(click.FloatRange):
    """A range of numbers that `nan` is not in."""

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class Several(click.ParamType):  # type: ignore[type-arg]
    """`a,b` -> (a, b): some of `known`, or, without it, any words."""

    name = "list"

    def __init__(self, known: Sequence[str] = ()) -> None:
        self.known = known

    def convert(
        self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(filter(None, (word.strip() for word in value.split(","))))
        for word in words:
            if self.known and word not in self.known:
                self.fail(f"{word!r} is unknown{did_you_mean(word, self.known)}", param, ctx)
        return words or self.fail("the list is empty", param, ctx)


class Sizes(click.ParamType):  # type: ignore[type-arg]
    """`1,8` -> (1, 8): numbers of at least 1."""

    name = "list"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = value.split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            self.fail(f"{value!r} is not a list of sizes such as 1,8", param, ctx)
        return tuple(map(int, words))


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path), default=DEFAULT_BUNDLE)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout instead.")
device_option = click.option("--device", default="auto", show_default=True, help="Run on cpu, cuda, cuda:N, or auto.")
precision_option = click.option(
    "--precision", type=Choice(PRECISIONS), default="fp32", show_default=True, help="Run draft and head in this."
)
backbone_option = click.option(
    "--backbone",
    type=Choice(BACKBONES),
    help="Run the backbone in eager PyTorch, as CUDA graphs, or as CUDA graphs of what torch.compile made. [default: "
    "eager with --backend torch and on the CPU, else graph]",
)
backbone_precision_option = click.option(
    "--backbone-precision",
    type=Choice(BACKBONE_PRECISIONS),
    default="bundle",
    show_default=True,
    help="Run the backbone in this. bundle: what its weights are stored in; fp8: E4M3 in the MLPs of the Llama blocks.",
)
backbones_option = click.option(
    "--backbone",
    "backbones",
    type=Several(BACKBONES),
    default=(),
    help=f"Run it in these ways: {', '.join(BACKBONES)}. [default: all that may run here]",
)
backbone_precisions_option = click.option(
    "--backbone-precision",
    "backbone_precisions",
    type=Several(BACKBONE_PRECISIONS),
    default="bundle",
    show_default=True,
    help=f"Run each in these precisions: {', '.join(BACKBONE_PRECISIONS)}.",
)
engines_option = click.option(
    "--engines",
    type=click.Path(path_type=Path),
    default=DEFAULT_ENGINES,
    show_default=True,
    help="Find exports here.",
)


class Bar:
    """A progress bar on stderr: how many are done, and a few words beside it."""

    def __init__(self, what: str, total: int | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn(what), BarColumn(BAR), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[words]}"), console=Console(stderr=True))
        self.bar = self.progress.add_task("", total=total, words="")

    def __enter__(self: BarT) -> BarT:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress.live.is_started:  # else it prints an empty line
            self.progress.stop()


BarT = TypeVar("BarT", bound=Bar)


class EpisodeProgress(Bar):
    """Episodes, success so far and, if `timed`, policy time per action."""

    def __init__(self, timed: bool) -> None:
        super().__init__("episodes")
        self.timed = timed

    def __enter__(self) -> EpisodeProgress:
        """The bar shows itself when it is told how many episodes there are: before that, errors stand alone."""
        self.loading = self.progress.console.status("loading the policy")
        self.loading.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loading.stop()
        super().__exit__()

    def start(self, total: int, done: Iterable[Episode]) -> None:
        from rsd_trt.eval.statistics import what_can_be_shown

        self.loading.stop()
        self.episodes = list(done)
        self.total, self.found = total, len(self.episodes)
        self.progress.console.print(what_can_be_shown(total), soft_wrap=True)
        words = "" if self.found == total else "waiting for simulator and episode 1"
        self.progress.update(self.bar, total=total, completed=self.found, words=words)
        self.progress.start()

    def add(self, _: EvalRequest, episode: Episode) -> None:
        self.episodes.append(episode)
        done = [e for e in self.episodes if e.error is None]
        steps = sum(e.steps for e in done)
        errors = len(self.episodes) - len(done)
        words = f"success {sum(e.success for e in done)}/{len(done)}"
        if steps and self.timed:
            words += f", {sum(e.policy_ms for e in done) / steps:.2f} ms/action"
        words += f", {errors} errors" if errors else ""
        self.progress.update(self.bar, advance=1, words=words)


class BuildProgress(Bar):
    """Artefacts, and how far the one under way is."""

    def __init__(self, total: int) -> None:
        super().__init__("exports", total)

    def step(self, phase: str, done: int, total: int) -> None:
        self.progress.update(self.bar, words=f"{phase} {done}/{total}")

    def add(self, outcome: Outcome) -> None:
        words = f"{outcome.artefact.name}: {'built' if outcome.built else 'fresh'}"
        self.progress.update(self.bar, advance=1, words=words)


def command_line() -> str:
    """The command that was given, for what it measures to be measured again."""
    return shlex.join(["rsd-trt", *sys.argv[1:]])


def show(*tables: RenderableType) -> None:
    """Prints to stdout; wide where the output is not a terminal, so that nothing is cut."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)
    for table in tables:
        console.print(table)


def note_untrained(trained: bool) -> None:
    if not trained:
        click.echo("note: the bundle is UNTRAINED (random weights): a success rate of 0 is what it must give")


def note_disturbed(clock: object) -> None:
    """A line for each thing that disturbed the machine while times were taken. clock: a `Steadiness`, as JSON too."""
    from rsd_trt.load import Steadiness
    from rsd_trt.records import from_json, to_json

    if clock is not None:
        plain = to_json(clock) if isinstance(clock, Steadiness) else clock
        for sentence in from_json(Steadiness, plain, "clock").disturbed:
            click.echo(f"disturbed: {sentence}")


def check_measured(rows: Iterable[tuple[str, Mapping[str, str], str | None]]) -> None:
    """Raises UserError if a value that the command line gives for an option has no figure. What an option offers when
    it is left out may be impossible here; what is asked for by name may not. rows: what it is, the values of options
    that it belongs to, by their parameters' names, and why it was not measured, if it was not."""
    context = click.get_current_context()
    flags = {param.name: param.opts[0] for param in context.command.params}
    measured: set[tuple[str, str]] = set()
    missing: dict[tuple[str, str], str] = {}
    for what, values, reason in rows:
        given = [x for x in values if context.get_parameter_source(x) is ParameterSource.COMMANDLINE]
        key = " ".join(f"{flags[x]} {values[x]}" for x in given), what
        if reason is None:
            measured.add(key)
        elif given:
            missing.setdefault(key, reason)
    reasons = {named: reason for (named, what), reason in missing.items() if (named, what) not in measured}
    for named, reason in reasons.items():
        others = [other for other in reasons if other != named]
        more = f"; neither could {', '.join(others)}" if others else ""
        raise UserError(f"{named} was asked for and could not be measured: {reason}{more}")


def list_reasons(what: str, rows: Iterable[tuple[str, str]]) -> None:
    """A line for each reason, with the names of the rows that it left without figures. rows: (name, reason)."""
    reasons: dict[str, dict[str, None]] = {}
    for name, reason in rows:
        reasons.setdefault(reason, {})[name] = None
    for reason, names in reasons.items():
        click.echo(f"{what}: {', '.join(names)}: {reason}")
