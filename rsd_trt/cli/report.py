"""Commands that read results files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import structs

from rsd_trt.cli.console import FiniteRange, command_line, json_option, note_untrained, show
from rsd_trt.config import DEFAULT_BUNDLE, DEFAULT_RESULTS, HOME, MAX_TOLERANCE
from rsd_trt.errors import UserError

if TYPE_CHECKING:
    from rsd_trt.eval.report.write import Written

profile_option = click.option(
    "--profile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Price the counts with this profile.json of rsd-trt profile. [default: count full queries]",
)
within_option = click.option(
    "--within",
    type=click.IntRange(1),
    help="Test success within so many steps. [default: 100 on libero_spatial, else all of an episode's]",
)


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@profile_option
@within_option
@json_option
def compare(a: Path, b: Path, profile: Path | None, within: int | None, as_json: bool) -> None:
    """Compare two results files of the same episodes; what is said is of B beside A.

    Episodes are paired by task and initial state. Success is tested with McNemar's exact test, and once more by task.
    Cost is checks and full queries times their medians in a profile; without one, full queries per action.

    \b
    Example: rsd-trt compare results/libero_spatial_baseline_results.json results/libero_spatial_rsd_results.json
    """
    from rsd_trt.eval.read import read_run
    from rsd_trt.eval.report.compare import compare as compare_runs
    from rsd_trt.eval.report.cost import COUNTED, cannot_save_time, read_price
    from rsd_trt.eval.report.runs import run_names
    from rsd_trt.eval.report.tables import comparison_table
    from rsd_trt.records import to_json

    runs = read_run(a), read_run(b)
    scripts = [run.settings.policy for run in runs if run.settings.bundle is None]
    if len(scripts) == 1:
        raise UserError(f"{scripts[0]} is a script, and the other run is of a bundle: two of a kind are compared")
    if scripts and profile is not None:
        raise UserError("--profile prices queries, and scripts make none", "Leave it out")
    first, second = (str(a), str(b)) if scripts else run_names(runs)
    comparison = compare_runs(*runs, COUNTED if scripts else read_price(profile, runs), within, (first, second))
    if as_json:
        click.echo(json.dumps(to_json(comparison), indent=2))
        return
    _notice(cannot_save_time(runs))
    show(comparison_table(comparison))
    note_untrained(all(run.settings.bundle is None or run.settings.bundle.trained for run in runs))


@click.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=HOME / "report",
    show_default=True,
    help="Write the report to this folder.",
)
@profile_option
@within_option
@json_option
def report(results: tuple[Path, ...], out: Path, profile: Path | None, within: int | None, as_json: bool) -> None:
    """Write a report on results files, or on those of a folder: report.html, .md, performance_comparison.json.

    Without RESULTS: on those in ./results, or in $RSD_TRT_HOME/results.

    Every run that checks is set against open loop: with one action a query, and the best that costs no more. With
    --profile, cost is in ms. OUT/frontier.png shows success against it. report.html needs no network.

    \b
    Example: rsd-trt report results/*_results.json --profile results/profile.json
    """
    from rsd_trt.eval.report.write import write_report

    show_report(write_report(results or (DEFAULT_RESULTS,), out, command_line(), profile, within), as_json)


def show_report(written: Written, as_json: bool) -> None:
    """What a report says first, and its files."""
    from rsd_trt.records import to_json

    if as_json:
        click.echo(json.dumps(to_json(written.comparison), indent=2))
        return
    from rsd_trt.eval.report.tables import matrix

    _notice(written.comparison.notice)
    show(matrix(written.runs, written.comparison.price))
    for path in written.files:
        click.echo(path)
    note_untrained(all(run.results.settings.of_bundle.trained for run in written.runs))


def _notice(notice: str | None) -> None:
    if notice is not None:
        click.echo(f"note: {notice}")


@click.command()
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="[BUNDLE] SHADOW")
@click.option(
    "--alpha",
    type=FiniteRange(1e-4, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Bound the share of checks rejected wrongly, of those that main confirms.",
)
@click.option(
    "--limit",
    type=FiniteRange(0, MAX_TOLERANCE, min_open=True),
    help="Let main move a step that it confirms by so much, in environment units. "
    "[default: the tolerance that SHADOW was run with]",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Draw the held-out episodes with this seed."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Write the calibrated copy to this folder. [default: bundles/NAME-calibrated]",
)
@json_option
def calibrate(
    paths: tuple[Path, ...], alpha: float, limit: float | None, seed: int, out: Path | None, as_json: bool
) -> None:
    """Choose the rule's tolerance or threshold from a shadow run, and write it into a copy of the bundle.

    SHADOW is the results file of rsd-trt eval --mode shadow, whose rule and numbers of steps the copy gets. One half
    of its episodes chooses the strictest that rejects at most ALPHA of the checks that main confirms; the other half
    shows what it rejects and accepts wrongly.

    \b
    Example: rsd-trt calibrate bundles/mine results/libero_spatial_shadow_results.json --alpha 0.2
    """
    if len(paths) > 2:
        raise click.UsageError(f"got {len(paths)} paths: give a shadow run's results file, or a bundle and the file")
    bundle, shadow = paths if len(paths) == 2 else (DEFAULT_BUNDLE, paths[0])
    from rsd_trt.bundle import Bundle, copy_with
    from rsd_trt.eval.read import read_run
    from rsd_trt.eval.report.calibrate import calibrate as choose
    from rsd_trt.records import to_json

    opened = Bundle.open(bundle)
    calibration = choose(opened, read_run(shadow), alpha, limit, seed)
    copy = copy_with(
        opened,
        structs.replace(opened.config, rsd=calibration.chosen.rsd),
        out or Path("bundles", f"{opened.config.name}-calibrated"),
    )
    if as_json:
        click.echo(json.dumps({**to_json(calibration), "bundle": str(copy.path)}, indent=2))
        return
    from rsd_trt.eval.report.tables import calibration_table

    show(calibration_table(calibration))
    chosen, (ours, held_out) = calibration.chosen, calibration.episodes
    limits = ", ".join(f"{x:g}" for x in calibration.limit)
    click.echo(f"main confirms a step that it moves by at most {limits}, with the same gripper")
    said = f"{'within' if chosen.false_rejects <= alpha else 'ABOVE'} alpha {alpha:g}"
    click.echo(
        f"chosen on {ours} {calibration.unit}; of {held_out} held out, rejected wrongly: {chosen.false_rejects:.1%}, "
        f"{said}; accepted wrongly: {chosen.false_accepts:.1%}"
    )
    click.echo(f"bundle with the chosen threshold: {copy.path}")


COMMANDS = (compare, report, calibrate)
