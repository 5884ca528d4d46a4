"""Commands that read results files."""

from __future__ import annotations

import json
from pathlib import Path

import click
from msgspec import structs

from rsd_trt.cli.console import FiniteRange, command_line, json_option, note_untrained, show
from rsd_trt.config import DEFAULT_BUNDLE, MAX_TOLERANCE


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@json_option
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Compare two results files of the same episodes; the speed-up is B's over A.

    Episodes are paired by task and initial state. Success is tested with McNemar's exact test; the speed-up's
    interval is a bootstrap over episodes, and is given for single timing on the same hardware only.

    \b
    Example: rsd-trt compare results/libero_spatial_baseline_results.json results/libero_spatial_rsd_results.json
    """
    from rsd_trt.eval.read import read_run
    from rsd_trt.eval.report.compare import compare as compare_runs
    from rsd_trt.records import to_json

    runs = read_run(a), read_run(b)
    comparison = compare_runs(*runs)
    if as_json:
        click.echo(json.dumps(to_json(comparison), indent=2))
        return
    from rsd_trt.eval.report.tables import comparison_table, runs_table

    baseline, other = comparison.modes
    show(runs_table(dict(zip(comparison.modes, runs, strict=True))))
    show(comparison_table([(other, baseline, comparison, None)]))
    note_untrained(comparison.trained)


@click.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("report"), show_default=True, help="Folder.")
@click.option(
    "--replay",
    type=click.Path(path_type=Path, dir_okay=False),
    help="replay.json of rsd-trt replay: the times of runs with batched timing.",
)
@json_option
def report(results: tuple[Path, ...], out: Path, replay: Path | None, as_json: bool) -> None:
    """Write a report on results files, or on those of a folder: OUT/report.html, .md, performance_comparison.json.

    Every run is compared with the baseline of the same settings, and judged by the experiment's targets: success
    above 85%, speed-up above 1.2x, acceptance above 60%. Runs with several n_action_steps whose times are known make
    OUT/tradeoff.png, too: success against policy time per action. report.html needs no network.

    \b
    Example: rsd-trt report results/libero_spatial_baseline_results.json results/libero_spatial_rsd_results.json
    """
    from rsd_trt.eval.report.write import write_report
    from rsd_trt.records import to_json

    written = write_report(results, out, command_line(), replay)
    if as_json:
        click.echo(json.dumps(to_json(written.comparison), indent=2))
        return
    from rsd_trt.eval.report.tables import targets_table

    show(targets_table(written.runs))
    for path in written.files:
        click.echo(path)
    note_untrained(all(run.results.settings.of_bundle.trained for run in written.runs))


@click.command()
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="[BUNDLE] SHADOW")
@click.option(
    "--alpha",
    type=FiniteRange(1e-4, 1, max_open=True),
    default=0.05,
    show_default=True,
    help="Bound on the share of queries accepted wrongly, of those that can be.",
)
@click.option(
    "--limit",
    type=FiniteRange(0, MAX_TOLERANCE, min_open=True),
    help="How far the main head may move a step of a chunk that still counts as right, in environment units. "
    "[default: the tolerance that SHADOW was run with]",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the held-out episodes.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="The calibrated copy. [default: bundles/NAME-calibrated]"
)
@json_option
def calibrate(
    paths: tuple[Path, ...], alpha: float, limit: float | None, seed: int, out: Path | None, as_json: bool
) -> None:
    """Choose the acceptance tolerance from a shadow run, and write it into a copy of the bundle.

    SHADOW is the results file of rsd-trt eval --mode shadow. Three fifths of its episodes choose the tolerance of each
    dimension, the others show what it does.

    \b
    Example: rsd-trt calibrate bundles/mine results/libero_spatial_shadow_results.json --alpha 0.05
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
    rsd = structs.replace(opened.config.rsd, tolerance=calibration.chosen.tolerance)
    copy = copy_with(
        opened, structs.replace(opened.config, rsd=rsd), out or Path("bundles", f"{opened.config.name}-calibrated")
    )
    if as_json:
        click.echo(json.dumps({**to_json(calibration), "bundle": str(copy.path)}, indent=2))
        return
    from rsd_trt.eval.report.tables import calibration_table

    show(calibration_table(calibration))
    chosen, (for_spread, for_scale, held_out) = calibration.chosen, calibration.episodes
    limits = ", ".join(f"{x:g}" for x in calibration.limit)
    click.echo(f"a step is right while the main head moves it by at most {limits}, and keeps its gripper")
    verdict = f"{'within' if chosen.false_accepts <= alpha else 'ABOVE'} alpha {alpha:g}"
    click.echo(
        f"chosen on {for_spread + for_scale} episodes; of {held_out} held out, accepted wrongly: "
        f"{chosen.false_accepts:.1%}, {verdict}"
    )
    click.echo(f"bundle with the chosen tolerance: {copy.path}")


COMMANDS = (compare, report, calibrate)
