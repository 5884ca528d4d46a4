"""The command that drives LIBERO."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
from click.core import ParameterSource

from rsd_trt.cli.console import (
    EpisodeProgress,
    FiniteRange,
    backbone_option,
    backbone_precision_option,
    bundle_argument,
    command_line,
    device_option,
    engines_option,
    json_option,
    note_untrained,
    precision_option,
    show,
)
from rsd_trt.config import (
    MAX_TOLERANCE,
    MODES,
    POLICIES,
    PROTOCOLS,
    SUITES,
    BackboneKind,
    BackbonePrecision,
    Mode,
    PolicyKind,
    Precision,
)
from rsd_trt.errors import UserError
from rsd_trt.jsonio import to_json

OF_A_BUNDLE = (
    *("bundle", "mode", "backend", "device", "n_action_steps", "tolerance", "accept_rate"),
    *("precision", "backbone", "backbone_precision", "engines", "record_hidden"),
)
MAX_TASK = 999  # more than any suite has; keeps a slip of the keyboard from filling the memory


class TaskList(click.ParamType["tuple[int, ...] | None"]):
    """`0,3` or `0-4` or `all` -> task numbers, without repeats, in order."""

    name = "tasks"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...] | None:
        if value is None or isinstance(value, tuple):
            return value
        if value == "all":
            return None
        tasks: set[int] = set()
        try:
            for part in str(value).split(","):
                first, _, last = part.partition("-")
                tasks.update(range(int(first), min(int(last or first), MAX_TASK) + 1))
        except ValueError:
            self.fail(f"{value!r} is not a list such as 0,3 or 0-4 or all", param, ctx)
        if not tasks:
            self.fail(f"{value!r} names no task", param, ctx)
        return tuple(sorted(tasks))


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


@click.command("eval")
@bundle_argument
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default="bundle",
    show_default=True,
    help="expert: a scripted one that is told where the objects of libero_spatial are. Needs no bundle; shows whether "
    "the simulator is right.",
)
@click.option("--suite", default="libero_spatial", show_default=True, help=f"One of {', '.join(SUITES)}.")
@click.option("--tasks", type=TaskList(), default="all", show_default=True, help="As in 0,3 or 0-4.")
@click.option("--trials", type=click.IntRange(1), default=50, show_default=True, help="Of every task.")
@click.option("--mode", type=click.Choice(MODES), default="rsd", show_default=True, help="How queries are answered.")
@click.option("--backend", default="torch", show_default=True, help="What runs draft, head and decoder.")
@device_option
@click.option(
    "--n-action-steps",
    type=click.IntRange(1),
    help="Actions a query commits at most. [default: the bundle's]",
)
@click.option(
    "--tolerance",
    type=FiniteRange(0, MAX_TOLERANCE),
    help="With --mode rsd or shadow: how far draft and plan may differ in any arm dimension, in environment units. "
    "[default: the bundle's]",
)
@click.option(
    "--accept-rate",
    type=AcceptRate(),
    metavar="RATE|RESULTS",
    help="With --mode random: how often its coin accepts, or the results file of an rsd run to take that from.",
)
@click.option(
    "--protocol",
    type=click.Choice(sorted(PROTOCOLS)),
    help="oft: OpenVLA-OFT's; seed: the original experiment's. [default: the bundle's control]",
)
@click.option("--max-steps", type=click.IntRange(1), help="Of an episode. [default: the protocol's for the suite]")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=7, show_default=True, help="Of every random generator."
)
@click.option(
    "--perturb",
    type=click.IntRange(0),
    metavar="SEED",
    help="Displace the target of libero_spatial once an episode, by 2-5 cm before the grasp: the same in every mode.",
)
@precision_option
@backbone_option
@backbone_precision_option
@engines_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder.")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Simulator processes. More than one: faster, and without times of single queries.",
)
@click.option(
    "--timeout",
    type=FiniteRange(1, 86400),
    default=300.0,
    show_default=True,
    help="Seconds of a simulator's silence after which its process is replaced.",
)
@click.option("--fresh", is_flag=True, help="Start over instead of resuming the run in --out.")
@click.option("--video", is_flag=True, help="Record an MP4 of every episode (renders every step: slower).")
@click.option(
    "--record-hidden",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --mode shadow: write the hidden states to this safetensors file, for verify --hidden.",
)
@json_option
def evaluate(
    bundle: Path,
    policy: PolicyKind,
    suite: str,
    tasks: tuple[int, ...] | None,
    trials: int,
    mode: Mode,
    backend: str,
    device: str,
    n_action_steps: int | None,
    tolerance: float | None,
    accept_rate: float | Path | None,
    protocol: str | None,
    max_steps: int | None,
    seed: int,
    perturb: int | None,
    precision: Precision,
    backbone: BackboneKind | None,
    backbone_precision: BackbonePrecision,
    engines: Path,
    out: Path,
    workers: int,
    timeout: float,
    fresh: bool,
    video: bool,
    record_hidden: Path | None,
    as_json: bool,
) -> None:
    """Drive LIBERO episodes with a bundle and write OUT/SUITE_MODE_results.json, or OUT/SUITE_expert_results.json.

    A run that was stopped or killed goes on where it was. Exit code 1 if an episode ended in an error.

    Mode shadow acts as baseline and records what rsd would have decided. Mode random is rsd with a coin in the draft's
    place: the control that shows what the draft's judgement is worth.

    \b
    Example: rsd-trt eval --suite libero_spatial --tasks 0,3 --trials 2 --mode rsd
    """
    if record_hidden is not None and mode != "shadow":
        raise click.UsageError("--record-hidden needs --mode shadow: the other modes do not compute both states")
    if (accept_rate is not None) != (mode == "random"):
        raise click.UsageError("--mode random needs --accept-rate, and no other mode has one")
    if tolerance is not None and mode not in ("rsd", "shadow"):
        raise click.UsageError(f"--tolerance is of the modes rsd and shadow: {mode} compares no draft with a plan")
    if policy == "expert":
        _refuse_what_is_of_a_bundle()
    if workers > 1:  # before torch is loaded: waiting threads that spin would take the cores from the simulators
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from examples.reference_policy.scripted import scripted_expert
    from rsd_trt.eval.libero.request import EvalRequest
    from rsd_trt.eval.libero.run import evaluate as run

    request = EvalRequest(
        policy=scripted_expert() if policy == "expert" else bundle,
        suite=suite,
        tasks=tasks,
        trials=trials,
        mode=mode,
        backend=backend,
        device=device,
        n_action_steps=n_action_steps,
        tolerance=tolerance,
        accept_rate=accept_rate,
        protocol=protocol,
        max_steps=max_steps,
        seed=seed,
        perturb=perturb,
        out=out,
        workers=workers,
        timeout=timeout,
        fresh=fresh,
        video=video,
        record_hidden=record_hidden,
        precision=precision,
        engines=engines,
        backbone=backbone,
        backbone_precision=backbone_precision,
    )
    with EpisodeProgress(timed=workers == 1 and policy == "bundle") as progress:
        results = run(request, progress.start, progress.add, command_line())
    if as_json:
        click.echo(json.dumps(to_json(results)))
    else:
        from rsd_trt.eval.report.compare import figures
        from rsd_trt.tables import figures_table, summary_table

        show(summary_table(results), figures_table({results.settings.label: figures(results)}))
        click.echo(f"results: {request.results_file}")
        note_untrained(results.settings.trained)
    if results.errors:
        from rsd_trt.eval.statistics import counted

        raise UserError(f"{counted(results.errors, 'episode')} ended in an error: see {request.results_file}")


def _refuse_what_is_of_a_bundle() -> None:
    """Raises UsageError if the command line says anything of a bundle."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name in OF_A_BUNDLE:
            raise click.UsageError(f"--policy expert runs no bundle: leave out {parameter.get_error_hint(context)}")


COMMANDS = (evaluate,)
