"""Commands that read results files."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from rsd_trt.cli.console import json_option, note_untrained, show


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@json_option
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Compare two results files of the same episodes; the speed-up is B's over A.

    Episodes are paired by task and initial state. Success is tested with McNemar's exact test; the speed-up's
    interval is a bootstrap over episodes, and is given for single timing only.

    \b
    Example: rsd-trt compare results/libero_spatial_baseline_results.json results/libero_spatial_rsd_results.json
    """
    from rsd_trt.eval.compare import compare as compare_runs
    from rsd_trt.eval.runs import read_run
    from rsd_trt.jsonio import to_json

    comparison = compare_runs(read_run(a), read_run(b))
    if as_json:
        click.echo(json.dumps(to_json(comparison), indent=2))
        return
    from rsd_trt.eval.conclusion import difference_sentence, speedup_sentence
    from rsd_trt.tables import figures_table

    baseline, other = comparison.modes
    show(figures_table(comparison.figures))
    click.echo(difference_sentence(comparison, other, baseline))
    click.echo(speedup_sentence(comparison, other, baseline))
    note_untrained(comparison.trained)


@click.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("report"), show_default=True, help="Folder.")
@json_option
def report(results: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write a report on one or more results files: OUT/report.html, report.md and performance_comparison.json.

    Every run is compared with the baseline of the same settings, and judged by the experiment's targets: success
    above 85%, speed-up above 1.2x, acceptance above 60%. report.html needs no network.

    \b
    Example: rsd-trt report results/libero_spatial_baseline_results.json results/libero_spatial_rsd_results.json
    """
    from rsd_trt.eval.report import write_report
    from rsd_trt.jsonio import to_json

    written = write_report(results, out, shlex.join(["rsd-trt", *sys.argv[1:]]))
    if as_json:
        click.echo(json.dumps(to_json(written.comparison), indent=2))
        return
    from rsd_trt.tables import targets_table

    show(targets_table(written.runs))
    for path in written.files:
        click.echo(path)
    note_untrained(all(run.results.settings.trained for run in written.runs))


COMMANDS = (compare, report)
