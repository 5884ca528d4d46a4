"""The command that drives LIBERO."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from click.core import ParameterSource

from rsd_trt.cli.console import (
    Choice,
    EpisodeProgress,
    FiniteRange,
    Several,
    Suite,
    backbone_option,
    backbone_precision_option,
    bundle_argument,
    command_line,
    device_option,
    engines_option,
    from_options,
    json_option,
    note_disturbed,
    note_untrained,
    precision_option,
    show,
)
from rsd_trt.config import BACKENDS, CHECKED, MAX_COUNT, MAX_TOLERANCE, MODES, PROTOCOLS, RULES, idle_in_all
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.request import EvalRequest, PolicyOptions, task_numbers
from rsd_trt.records import to_json

if TYPE_CHECKING:
    from rsd_trt.config import Mode
    from rsd_trt.eval.libero.perturb import PerturbSpec

Command = TypeVar("Command", bound=Callable[..., object])

COUNT = click.IntRange(1, 1_000_000)  # more is a slip of the keyboard, and may not fit into a results file


class TaskList(click.ParamType["tuple[int, ...] | None"]):
    """`0,3` or `0-4` or `all` -> task numbers, without repeats, in order."""

    name = "tasks"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...] | None:
        if value is None or isinstance(value, tuple):
            return value
        try:
            return task_numbers(str(value))
        except UserError as error:
            self.fail(str(error), param, ctx)


class AcceptRate(click.ParamType["float | Path | None"]):
    """`0.656`, or the results file of an rsd run that has the rate."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | Path | None:
        if value is None or isinstance(value, (float, Path)):
            return value
        try:
            rate = float(str(value))
        except ValueError:
            return Path(str(value))
        if not 0 <= rate <= 1:
            self.fail(f"{value!r} is not in 0..1", param, ctx)
        return rate


class Perturbation(click.ParamType["PerturbSpec | None"]):
    """`late:7:0.02-0.05`, `late:7`, or `7` for a displacement."""

    name = "perturbation"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> PerturbSpec | None:
        from rsd_trt.eval.libero.perturb import PerturbSpec  # NumPy: not for every command

        if value is None or isinstance(value, PerturbSpec):
            return value
        try:
            return PerturbSpec.parse(str(value))
        except UserError as error:
            self.fail(str(error), param, ctx)


def option(name: str, **settings: object) -> Callable[[Command], Command]:
    """An option with the default of the request's field."""
    default = getattr(EvalRequest, name.lstrip("-").replace("-", "_"))
    return click.option(name, default=default, show_default=default is not None, **settings)  # type: ignore[arg-type]


@click.command("eval")
@bundle_argument
@option(
    "--policy",
    metavar="MODULE:FUNCTION",
    help="Run act(simulator) -> actions [n, 7] of a Python module instead of a bundle, such as a scripted expert.",
)
@option("--suite", type=Suite(), help="Choose the suite; help lists all of them.")
@option("--tasks", type=TaskList(), help="Run these tasks, as in 0,3 or 0-4. [default: all]")
@option("--trials", type=COUNT, help="Run so many trials of every task.")
@option(
    "--mode",
    type=Several(MODES),
    metavar="MODE[,MODE]",
    help=f"Choose how queries are answered: {', '.join(MODES)}. Several share a model; one worker has them take turns.",
)
@option("--backend", type=Choice(BACKENDS), help="Choose what runs draft, head and decoder.")
@device_option
@option(
    "--n-action-steps",
    type=COUNT,
    help="Commit so many actions of a new chunk, at a full query. [default: the bundle's]",
)
@option(
    "--check-steps",
    type=COUNT,
    help="Commit so many actions of the old chunk, at an accepted check. [default: the bundle's]",
)
@option("--rule", type=Choice(RULES), help="Choose what a check has to pass. [default: the bundle's]")
@option(
    "--tolerance",
    type=FiniteRange(0, MAX_TOLERANCE),
    help="Let draft and chunk differ by so much in any arm dimension, in environment units, with the rules first, "
    "actions and path. [default: the bundle's]",
)
@option(
    "--threshold",
    type=FiniteRange(-MAX_COUNT, 0),
    help="Accept chunks of this mean log-probability and above, with the rule likelihood. [default: the bundle's]",
)
@option(
    "--sure",
    type=FiniteRange(-MAX_COUNT, 0),
    help="Commit one action only at a check that passes below this mean log-probability, with the rule likelihood. "
    "[default: the bundle's]",
)
@option(
    "--refresh",
    type=COUNT,
    help="Make a full query after so many steps of a chunk. [default: the bundle's]",
)
@option(
    "--accept-rate",
    type=AcceptRate(),
    metavar="RATE|RESULTS",
    help="With --mode random: accept at this rate, or at that of the rsd run with this results file.",
)
@option(
    "--protocol",
    type=Choice(sorted(PROTOCOLS)),
    help="Follow OpenVLA-OFT's evaluation (oft) or the original experiment's. [default: the bundle's control]",
)
@option("--max-steps", type=COUNT, help="End an episode after so many steps. [default: the protocol's]")
@option("--seed", type=click.IntRange(0, 2**32 - 1), help="Seed every random generator.")
@option(
    "--perturb",
    type=Perturbation(),
    metavar="[KIND:]SEED[+SEED...][:LOW-HIGH]",
    help="Perturb every episode of libero_spatial, the same in every mode. displace: the target jumps by 2-5 cm before "
    "the grasp; late: it slides by LOW-HIGH m when the hand comes near; moving: it slides at LOW-HIGH m/s until it is "
    "touched; harmless: a distractor slides or the light changes; frozen: the cameras stop for 5 steps. Of several "
    "seeds each is tried with every initial state. [default kind: displace]",
)
@precision_option
@backbone_option
@backbone_precision_option
@engines_option
@option("--out", type=click.Path(path_type=Path), help="Write the run's files to this folder.")
@option(
    "--workers",
    type=click.IntRange(1, 256),
    help="Run so many simulator processes. More than one: faster, and without times of single queries.",
)
@option(
    "--timeout",
    type=FiniteRange(1, 86400),
    help="Replace a simulator's process after so many seconds of silence.",
)
@option("--fresh", is_flag=True, help="Start over instead of resuming the run in --out.")
@option(
    "--video",
    is_flag=True,
    help="Record an MP4 of every episode with the check's verdict, and of several modes beside each other (renders "
    "every step: slower).",
)
@option(
    "--record-hidden",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --mode shadow: write the hidden states to this safetensors file, for verify --hidden.",
)
@option(
    "--record",
    type=click.Path(path_type=Path, file_okay=False),
    help="Record what every query sees and says into this folder, for rsd-trt distill.",
)
@option("--record-size", type=COUNT, help="Record frames of so many pixels a side.")
@option("--record-limit", type=FiniteRange(0), help="Record so many GB at the most.")
@json_option
def evaluate(as_json: bool, **options: object) -> None:
    """Drive LIBERO episodes with a bundle and write OUT/SUITE_MODE_results.json.

    A run that was stopped or killed goes on where it was. Exit code 1 if an episode ended in an error.

    Mode shadow acts as baseline and records what rsd would have decided. Mode random accepts at random, at a given
    rate: the control that shows what the draft's judgement is worth. Modes that are compared belong in one command:
    a machine that slows down then slows them all.

    \b
    Example: rsd-trt eval --suite libero_spatial --tasks 0,3 --trials 2 --mode baseline,rsd
    """
    modes = tuple(dict.fromkeys(options.pop("mode")))  # type: ignore[call-overload]
    request = from_options(EvalRequest, options, mode=modes[0])
    refuse_clashes(request, modes)
    requests = [_of_mode(request, mode) for mode in modes]
    if request.workers > 1:  # before torch is loaded: threads that spin would take the cores from the simulators
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rsd_trt.eval.libero import run

    with EpisodeProgress(timed=request.workers == 1 and request.policy is None and len(modes) == 1) as progress:
        results = run.evaluate_together(requests, progress.start, progress.add, command_line())
    if as_json:
        click.echo(json.dumps(to_json(results[0]) if len(results) == 1 else [to_json(one) for one in results]))
    else:
        from rsd_trt.eval.report.tables import counts_table, tasks_table

        if progress.found:
            click.echo(f"{progress.found} of {progress.total} were done already; to run them again: --fresh")
        for one, found in zip(requests, results, strict=True):
            show(tasks_table(found), counts_table(found))
            click.echo(f"results: {one.results_file}")
            note_disturbed(found.clock)
        if request.record is not None:
            made = f"rsd-trt distill {request.bundle} {request.record} -o NEW"
            click.echo(f"recordings: {request.record}. A draft from them: {made}")
        if request.video:
            click.echo(f"videos: {request.out / 'videos'}")
        note_untrained(results[0].settings.bundle is None or results[0].settings.bundle.trained)
    if errors := sum(found.errors for found in results):
        from rsd_trt.eval.statistics import counted

        files = " and ".join(
            str(one.results_file) for one, found in zip(requests, results, strict=True) if found.errors
        )
        raise UserError(f"{counted(errors, 'episode')} ended in an error", f"See {files}")


def _of_mode(request: EvalRequest, mode: Mode) -> EvalRequest:
    """The request in one of its modes: without what is of another."""
    return dataclasses.replace(
        request,
        mode=mode,
        accept_rate=request.accept_rate if mode == "random" else None,
        record_hidden=request.record_hidden if mode == "shadow" else None,
    )


def refuse_clashes(request: EvalRequest, modes: Sequence[Mode]) -> None:
    """Raises UsageError if an option that was given has no effect beside the others, in any of the modes."""
    context = click.get_current_context()
    given = {
        parameter.name: parameter.get_error_hint(context)
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    }
    if request.policy is not None:
        if not all(request.policy.partition(":")):
            raise click.UsageError(f"--policy {request.policy} is not MODULE:FUNCTION")
        for field in dataclasses.fields(PolicyOptions):
            if field.name in given:
                raise click.UsageError(f"--policy {request.policy} runs no bundle: leave out {given[field.name]}")
    if request.record_hidden is not None and "shadow" not in modes:
        raise click.UsageError(
            "--record-hidden needs --mode shadow: the other modes do not run the backbone at every query"
        )
    for name in ("record_size", "record_limit"):
        if name in given and request.record is None:
            raise click.UsageError(f"{given[name]} is of --record FOLDER")
    if (request.accept_rate is not None) != ("random" in modes):
        raise click.UsageError(
            "--mode random needs --accept-rate, such as 0.68 or an rsd run's results file, and no other mode has one"
        )
    if request.policy is None:
        _refuse_idle(request, modes)
    if "engines" in given and request.backend not in ("ort", "trt"):
        raise click.UsageError(f"--engines is of the backends ort and trt: {request.backend} runs no export")


def _refuse_idle(request: EvalRequest, modes: Sequence[Mode]) -> None:
    """Raises UsageError if an option of the checks has no effect in any mode."""
    given = {name: getattr(request, name) for name in CHECKED if getattr(request, name) is not None}
    if not given:
        return
    from rsd_trt.bundle import Bundle

    rsd = Bundle.open(request.bundle).config.rsd
    try:
        idle = idle_in_all((mode, rsd.idle(mode, given)) for mode in modes)
    except UserError as error:
        raise click.UsageError(str(error)) from None
    for name, why in idle.items():
        raise click.UsageError(f"--{name.replace('_', '-')} {why}")


COMMANDS = (evaluate,)
