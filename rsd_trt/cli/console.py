"""What the commands share: options, progress on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsd_trt.config import BACKBONE_PRECISIONS, BACKBONES, DEFAULT_BUNDLE, DEFAULT_ENGINES, PRECISIONS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rsd_trt.eval.results import Episode
    from rsd_trt.export.run import Outcome

AGAIN = 0.01  # s until a KeyboardInterrupt that got lost is raised once more


class FiniteRange(click.FloatRange):
    """A range of numbers that `nan` is not in."""

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


def split_list(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """`a,b` -> (a, b); nothing -> ()."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if value else ()


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path), default=DEFAULT_BUNDLE)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout instead.")
device_option = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto.")
precision_option = click.option(
    "--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of draft and head."
)
backbone_option = click.option(
    "--backbone",
    type=click.Choice(BACKBONES),
    help="How the backbone runs: eager PyTorch, CUDA graphs, or CUDA graphs of what torch.compile made. [default: "
    "eager with --backend torch and on the CPU, else graph]",
)
backbone_precision_option = click.option(
    "--backbone-precision",
    type=click.Choice(BACKBONE_PRECISIONS),
    default="bundle",
    show_default=True,
    help="bundle: what its weights are stored in; fp8: E4M3 in the MLPs of the Llama blocks.",
)
engines_option = click.option(
    "--engines", type=click.Path(path_type=Path), default=DEFAULT_ENGINES, show_default=True, help="Folder of exports."
)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Makes SIGTERM end the block as Ctrl-C does, and neither of them get lost.

    Python drops an exception that is raised while it collects garbage: a KeyboardInterrupt is raised again then.
    """
    lost = False

    def stop(*_: object) -> None:
        nonlocal lost
        lost = False
        raise KeyboardInterrupt

    def dropped(exception: sys.UnraisableHookArgs) -> None:
        nonlocal lost
        if exception.exc_type is not KeyboardInterrupt:
            hook(exception)
            return
        lost = True
        signal.setitimer(signal.ITIMER_REAL, AGAIN)

    hook = sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        sys.unraisablehook = dropped
        for number in handlers:
            signal.signal(number, stop)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if lost:
        raise KeyboardInterrupt


class EpisodeProgress:
    """A progress bar on stderr: episodes, success so far and, if `timed`, policy time per action."""

    def __init__(self, timed: bool) -> None:
        self.timed = timed

    def __enter__(self) -> EpisodeProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.episodes: list[Episode] = []
        self.progress = Progress(
            TextColumn("episodes"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, total: int, done: list[Episode]) -> None:
        from rsd_trt.eval.statistics import what_can_be_shown

        self.episodes = done
        self.progress.console.print(what_can_be_shown(total), soft_wrap=True)
        self.progress.start()
        self.bar = self.progress.add_task("", total=total, completed=len(done), figures="")

    def add(self, episode: Episode) -> None:
        self.episodes.append(episode)
        done = [e for e in self.episodes if e.error is None]
        steps = sum(e.steps for e in done)
        errors = len(self.episodes) - len(done)
        figures = f"success {sum(e.success for e in done)}/{len(done)}"
        if steps and self.timed:
            figures += f", {sum(e.policy_ms for e in done) / steps:.2f} ms/action"
        figures += f", {errors} errors" if errors else ""
        self.progress.update(self.bar, advance=1, figures=figures)


def command_line() -> str:
    """The command that was given, for what it measures to be measured again."""
    return shlex.join(["rsd-trt", *sys.argv[1:]])


def show(*tables: RenderableType) -> None:
    """Prints to stdout; wide where the output is not a terminal, so that nothing is cut."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        console.print(table)


def note_untrained(trained: bool) -> None:
    if not trained:
        click.echo("note: the bundle is UNTRAINED (random weights): a success rate of 0 is what it must give")


class BuildProgress:
    """A progress bar on stderr: artefacts, and how far the one under way is."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __enter__(self) -> BuildProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("exports"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[now]}"), console=Console(stderr=True))
        self.bar = self.progress.add_task("", total=self.total, now="")
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, phase: str, done: int, total: int) -> None:
        self.progress.update(self.bar, now=f"{phase} {done}/{total}")

    def add(self, outcome: Outcome) -> None:
        now = f"{outcome.artefact.name}: {'built' if outcome.built else 'fresh'}"
        self.progress.update(self.bar, advance=1, now=now)


class ReplayProgress:
    """A progress bar on stderr: episodes replayed."""

    def __enter__(self) -> ReplayProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.bar = self.progress.add_task("", total=None)
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, done: int, total: int) -> None:
        self.progress.update(self.bar, completed=done, total=total)


def list_reasons(what: str, rows: Sequence[Mapping[str, object]]) -> None:
    """A line for each reason, with the rows that it left without figures."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        name = f"{row.get('backend') or row.get('backbone')} {row.get('component') or row.get('what')}"
        names = reasons.setdefault(str(row["reason"]), [])
        names += [] if name in names else [name]
    for reason, names in reasons.items():
        click.echo(f"{what}: {', '.join(names)}: {reason}")
