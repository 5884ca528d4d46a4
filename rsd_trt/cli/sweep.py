"""The command that runs many settings and sets them against each other."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsd_trt.cli.console import Bar, command_line, json_option, show
from rsd_trt.cli.report import profile_option, show_report, within_option
from rsd_trt.config import BACKENDS, DEFAULT_RESULTS, MODES, RULES
from rsd_trt.errors import UserError

if TYPE_CHECKING:
    from rsd_trt.eval.results import Episode
    from rsd_trt.eval.sweep.cluster import RaySeats
    from rsd_trt.eval.sweep.forecast import Forecast
    from rsd_trt.eval.sweep.plan import Sweep

# The options of a TOML file, as far as a question about settings is asked on the command line. Lists have commas.
LISTS = {
    "mode": f"Answer queries in these ways: {', '.join(MODES)}.",
    "n_action_steps": "Commit so many actions of a new chunk, as in 1,2,4,8.",
    "check_steps": "Commit so many actions of the old chunk, at an accepted check.",
    "rule": f"Choose what a check has to pass: {', '.join(RULES)}.",
    "tolerance": "Let draft and chunk differ by so much, as in 0.1,0.2.",
    "threshold": "Accept chunks of this mean log-probability and above, with the rule likelihood.",
    "sure": "Commit one action only at a check that passes below this mean log-probability.",
    "perturb": "Perturb every episode, as in none,7 or late:7:0.02-0.05: none leaves them undisturbed.",
    "suite": "Run these suites.",
    "bundle": "Run the policies in these folders.",
}
SINGLE = {
    "policy": "Run act(simulator) of a Python module, MODULE:FUNCTION, instead of a bundle.",
    "tasks": "Run these tasks, as in 0,3 or 0-4. [default: all]",
    "trials": "Run so many trials of every task.",
    "backend": f"Choose what runs draft, head and decoder: {', '.join(BACKENDS)}.",
    "device": "Run on cpu, cuda or auto.",
    "max_steps": "End an episode after so many steps.",
    "workers": "Run so many simulator processes for each model that is loaded. [default: one a core]",
}


def plan_options(command: Callable[..., object]) -> Callable[..., object]:
    """An option for each of `LISTS` and `SINGLE`."""
    for name, text in reversed((LISTS | SINGLE).items()):
        metavar = f"{name.upper()},..." if name in LISTS else name.upper()
        command = click.option(f"--{name.replace('_', '-')}", name, metavar=metavar, help=text)(command)
    return command


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False, metavar="[SWEEP.toml]")
@plan_options
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Execute on the Ray cluster at ADDRESS (auto: the one of this machine). Without ADDRESS, start one here, with "
    "a model on each GPU.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=DEFAULT_RESULTS / "sweep",
    show_default=True,
    help="Write a folder for each run, and report, to this folder.",
)
@click.option("--dry-run", is_flag=True, help="Say what the sweep takes and can show, and run nothing.")
@profile_option
@within_option
@json_option
@click.pass_context
def sweep(
    context: click.Context,
    /,
    file: Path | None,
    ray: str | None,
    out: Path,
    dry_run: bool,
    profile: Path | None,
    within: int | None,
    as_json: bool,
    **options: str | None,
) -> None:
    """Run what SWEEP.toml and the options declare, as far as it is missing, and report on it.

    A list of values stands for a run with each of them; an option takes the place of the file's. Whatever stops the
    sweep, the same command goes on. Exit code 1 if an episode ended in an error.

    \b
    Example: rsd-trt sweep --mode baseline,rsd --n-action-steps 1,2,4,8 --perturb none,late:7:0.02-0.05 --dry-run
    """
    given = {name: _parsed(name, value) for name, value in options.items() if value is not None}
    if ray is not None and ray.endswith(".toml"):
        raise click.UsageError(f"--ray {ray} is no address: put --ray behind the file")
    if file is None and not given:
        raise click.UsageError("give a SWEEP.toml, or options such as --mode baseline,rsd --n-action-steps 1,2,4")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would take the cores from the simulators
    with contextlib.ExitStack() as stack:
        verbose = bool(context.find_root().params.get("verbose"))
        seats = stack.enter_context(_cluster(ray, verbose)) if ray is not None else None
        declared = _declared(file, given, out, seats)
        if dry_run:
            _forecast(declared, seats, as_json)
            return
        _check_report(declared)
        with SweepProgress() as progress:
            if seats is None:
                from rsd_trt.eval.sweep.run import sweep_here

                sweep_here(declared, progress, command_line())
            else:
                from rsd_trt.eval.sweep.board import conduct

                conduct(declared, seats, progress, command_line())
    _report(declared, out, profile, within, as_json)
    if progress.errors:
        from rsd_trt.eval.statistics import counted

        raise UserError(
            f"{counted(progress.errors, 'episode')} ended in an error", f"To run them again: {command_line()}"
        )


def _parsed(name: str, value: str) -> object:
    """An option's value as TOML would have it: a tuple where it is a list."""
    if name not in LISTS:
        return _scalar(value) if name in ("trials", "max_steps", "workers") else value
    return tuple(_scalar(word) for word in filter(None, (word.strip() for word in value.split(","))))


def _scalar(text: str) -> object:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


@contextlib.contextmanager
def _cluster(address: str, verbose: bool) -> Iterator[RaySeats]:
    from rsd_trt.eval.sweep.cluster import RaySeats

    seats = RaySeats(address, verbose)
    try:
        yield seats
    finally:
        seats.close()


def _declared(file: Path | None, given: dict[str, object], out: Path, seats: RaySeats | None) -> Sweep:
    """The sweep, with as many simulators as there are cores for a model where nobody says how many.

    Raises:
        UsageError: an option makes no sense.
    """
    from rsd_trt.eval.sweep.plan import read_sweep

    try:
        cores = len(os.sched_getaffinity(0))
        found = read_sweep(file, given, out, cores)
        if seats is None:
            return found
        requests = [run.request for run in found.runs]
        wants_gpu = any(request.policy is None and request.device != "cpu" for request in requests)
        asked = {request.workers for request in requests}
        workers = seats.plan(wants_gpu, max(asked) if asked != {cores} else None)
        return read_sweep(file, given, out, workers)
    except UserError as error:
        if file is None and str(error).startswith("the options"):
            raise click.UsageError(str(error)) from None
        raise


def _check_report(declared: Sweep) -> None:
    """Raises UserError if the report at the end could not be written: before the hours that it takes to get there."""
    if all(run.request.policy is not None for run in declared.runs):
        return
    from rsd_trt.eval.plots import check_plots
    from rsd_trt.eval.report.page import check_templates

    check_plots()
    check_templates()


def _report(declared: Sweep, out: Path, profile: Path | None, within: int | None, as_json: bool) -> None:
    """The report with the frontier; a table where scripts act, of which there is no report."""
    from rsd_trt.eval.report.tables import tasks_table
    from rsd_trt.records import to_json

    paths = [run.request.results_file for run in declared.runs]
    if any(run.request.policy is not None for run in declared.runs):
        from rsd_trt.eval.read import read_run

        found = [read_run(path) for path in paths]
        if as_json:
            click.echo(json.dumps([to_json(results) for results in found]))
        else:
            show(*map(tasks_table, found))
        return
    from rsd_trt.eval.report.write import write_report

    tested: dict[Path, set[str]] = {path: set() for path in paths}
    for one in declared.comparisons:
        tested[next(run.request.results_file for run in declared.runs if run.name == one.run)].add(one.against)
    show_report(write_report(paths, out / "report", command_line(), profile, within, tested), as_json)


def _forecast(declared: Sweep, seats: RaySeats | None, as_json: bool) -> None:
    from rsd_trt.eval.statistics import counted
    from rsd_trt.eval.sweep.forecast import forecast
    from rsd_trt.eval.table import Column, Table
    from rsd_trt.records import to_json

    places = 1 if seats is None else len(seats.places())
    found = forecast(declared, places)
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2))
        return
    columns = (Column("run"), Column("episodes"), Column("missing"), Column("an episode", "s"), Column("speed of"))
    rows = tuple((run.name, run.episodes, run.missing, run.seconds_an_episode, run.seconds_of) for run in found.runs)
    show(Table("", columns, rows))
    click.echo(
        f"{counted(found.missing, 'episode')} of {found.episodes:,} to run: about {_duration(found.hours * 3600)} "
        f"with {counted(found.workers, 'simulator')} and {counted(places, 'model')} at a time"
    )
    click.echo(_showable(found))


def _showable(found: Forecast) -> str:
    from rsd_trt.eval.statistics import counted

    if not found.comparisons:
        return "no comparison is declared: there is no rsd run"
    told = [
        f"{'none' if points is None else f'{points * 100:.1f} points'} if {share} of the pairs differ"
        for share, points in found.smallest_difference.items()
    ]
    return (
        f"{counted(found.comparisons, 'comparison')} of {found.pairs:,} pairs at least; smallest difference shown with "
        f"power .8 (McNemar's exact test, Holm): {', '.join(told)}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


class SweepProgress(Bar):
    """All runs together: episodes, success so far, speed, and what went wrong."""

    def __init__(self) -> None:
        super().__init__("sweep")
        self.errors = self.done = self.successes = self.added = self.losses = 0

    def __enter__(self) -> SweepProgress:
        """It shows itself when it is told how many episodes there are: before that, errors stand alone."""
        return self

    def start(self, total: int, done: int, successes: int) -> None:
        self.done, self.successes, self.began = done, successes, time.monotonic()
        words = "" if done == total else "waiting for simulators and a first episode"
        self.progress.update(self.bar, total=total, completed=done, words=words)
        self.progress.start()

    def add(self, run: str, episode: Episode) -> None:
        self.added += 1
        if episode.error is None:
            self.done += 1
            self.successes += episode.success
        else:
            self.errors += 1
        self._tell(run)

    def lost(self, message: str) -> None:
        self.losses += 1
        self.progress.console.print(message, soft_wrap=True, markup=False, highlight=False)

    def _tell(self, run: str) -> None:
        speed = self.added / max(1e-9, time.monotonic() - self.began)
        words = f"{run}  success {self.successes}/{self.done}, {speed:.2f} episodes/s"
        words += f", {self.errors} errors" if self.errors else ""
        words += f", {self.losses} seats lost" if self.losses else ""
        self.progress.update(self.bar, completed=self.done, words=words)


COMMANDS = (sweep,)
